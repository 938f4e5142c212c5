"""The picture of the study. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.problems import SPLITS, Problem
from benchmarks.study.report import outcome
from benchmarks.study.results import Results
from benchmarks.study.rules import REFERENCE, Rule

TITLES = {"alike": "shards alike", "split": "shards split by class"}
COLORS = ("#1f77b4", "#d95f02")
"""By number of ranks, in the order of the problems: also told apart by their marks."""
MARKS = ("o", "s")
TICKS = (-2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 5, 10, 20)
"""Percentage points."""
LINEAR = 0.5
"""Up to which the axis is linear; logarithmic beyond."""


def draw(problems: Sequence[Problem], results: Results, path: Path) -> None:
    """The difference of every rule to k = 10, with its interval: a panel for each split, a line for each
    rule, a mark for each of `problems`, which have the same rules and different ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator

    rules = [rule for rule in problems[0].rules if rule is not REFERENCE]
    figure, panels = pyplot.subplots(
        1, len(SPLITS), figsize=(11, 1.2 + 0.33 * len(rules)), sharey=True, layout="constrained"
    )
    for panel, split in zip(panels, SPLITS, strict=True):
        for index, problem in enumerate(problems):
            places, means, halves = _points(problem, split, rules, results)
            if not places:
                continue
            shifted = [place + 0.24 * (index - (len(problems) - 1) / 2) for place in places]
            panel.errorbar(
                *(means, shifted),
                xerr=halves,
                fmt=MARKS[index],
                color=COLORS[index],
                markersize=4,
                capsize=2,
                label=f"{problem.ranks} ranks",
            )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_xscale("symlog", linthresh=LINEAR)
        panel.xaxis.set_major_locator(FixedLocator(TICKS))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.set_title(TITLES[split])
        panel.set_xlabel("difference of the error to that of k = 10, percentage points (left: better)")
    panels[0].set_yticks(range(len(rules)), [rule.name for rule in rules])
    panels[0].invert_yaxis()
    panels[0].legend(loc="best")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(
    problem: Problem, split: str, rules: Sequence[Rule], results: Results
) -> tuple[list[int], list[float], list[float]]:
    """Of the rules that have a difference: their places, the means, and half of the intervals' widths."""
    names = {rule.name for rule in problem.rules}
    places, means, halves = list[int](), list[float](), list[float]()
    for place, rule in enumerate(rules):
        found = outcome(problem, split, rule, results) if rule.name in names else None
        if found is not None and found.difference is not None:
            places.append(place)
            means.append(found.difference.mean)
            halves.append(found.difference.half)
    return places, means, halves
