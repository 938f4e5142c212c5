"""The table of the study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.study.intervals import Interval, paired
from benchmarks.study.plan import Cell
from benchmarks.study.problems import SPLITS, Problem
from benchmarks.study.results import Result, Results
from benchmarks.study.rules import REFERENCE, Rule

HEADING = [
    "problem",
    "rule",
    "averages",
    "MB sent",
    *(words for split in SPLITS for words in (f"{split}: error", "difference to k = 10", "lr")),
]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rule came to in a problem with one of the splits."""

    rate: float
    errors: dict[int, float]
    """By seed, in percent where they are shares; infinity if the training diverged."""
    difference: Interval | None
    """To `REFERENCE`, over the same seeds; None where there is none."""
    averages: float
    """Mean over the seeds, as is `megabytes`."""
    megabytes: float
    """That a rank sends in averages if every rank has a host of its own."""

    @property
    def diverged(self) -> int:
        """How many trainings did."""
        return sum(not math.isfinite(error) for error in self.errors.values())


def unit(problem: Problem) -> str:
    """Of its errors."""
    if problem.metric != "error":
        return problem.metric
    return "%" if problem.task == "classification" else "squared error"


def outcome(problem: Problem, split: str, rule: Rule, results: Results) -> Outcome | None:
    """None as long as not all seeds have been trained."""
    cell = Cell(problem=problem, split=split, rule=rule)
    found = cell.final(results)
    if len(found) < len(problem.seeds):
        return None
    base = Cell(problem=problem, split=split, rule=REFERENCE).final(results)
    errors, others = _errors(problem, found), _errors(problem, base)
    return Outcome(
        rate=found[problem.seeds[0]].rate,
        errors=errors,
        difference=None if rule is REFERENCE else paired(errors, others),
        averages=statistics.mean(result.values["averages"] for result in found.values()),
        megabytes=statistics.mean(result.values["bytes"] for result in found.values()) / 1e6,
    )


def _errors(problem: Problem, found: dict[int, Result]) -> dict[int, float]:
    factor = 100 if unit(problem) == "%" else 1
    return {seed: factor * result.error for seed, result in found.items()}


def table(problems: Iterable[Problem], results: Results) -> list[list[str]]:
    """Rows of cells, one for each rule of a problem that has been trained with both splits."""
    rows = [HEADING]
    for problem in problems:
        name = f"{problem.name}, {problem.ranks} ranks ({unit(problem)})"
        for rule in problem.rules:
            found = [outcome(problem, split, rule, results) for split in SPLITS]
            complete = [of for of in found if of is not None]
            if len(complete) == len(SPLITS):
                rows.append([name, rule.name, *_cells(complete)])
                name = ""
    return rows


def _cells(found: Sequence[Outcome]) -> list[str]:
    cells = [_both(f"{of.averages:,.0f}" for of in found), _both(_short(of.megabytes) for of in found)]
    for of in found:
        cells += [_error(of), _difference(of), f"{of.rate:g}"]
    return cells


def _both(values: Iterable[str]) -> str:
    """Of the splits, once if they are the same."""
    return " / ".join(dict.fromkeys(values))


def _short(megabytes: float) -> str:
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.3g}"


def _error(of: Outcome) -> str:
    if of.diverged:
        return f"{of.diverged} of {len(of.errors)} diverged"
    return f"{statistics.mean(of.errors.values()):.2f}"


def _difference(of: Outcome) -> str:
    """With its interval, in bold where that excludes 0."""
    if of.difference is None:
        return ""
    mean, half = of.difference.mean, of.difference.half
    words = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    return f"**{words}**" if of.difference.excludes_zero else words
