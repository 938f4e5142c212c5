"""What is to be trained next. First the learning rate of a rule is chosen by trainings with a seed and with
rows that the final trainings do not have; then it is trained with every seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.study.problems import SELECTION, SELECTION_SEED, SPLITS, TEST, Problem, Training
from benchmarks.study.results import Result, Results
from benchmarks.study.rules import Rule

MOST_RATES = 8
"""That a rule may try: where a training diverges at all of them, or none is better than the next."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A rule in a problem with one of the splits."""

    problem: Problem
    split: str
    rule: Rule

    def training(self, rate: float, seed: int, part: str) -> Training:
        """One of its trainings."""
        return Training(
            problem=self.problem, split=self.split, rule=self.rule, rate=rate, seed=seed, part=part
        )

    def tried(self, results: Results) -> dict[float, float]:
        """The error by learning rate, of those that were tried one after the other from the given ones on."""
        errors: dict[float, float] = {}
        rate: float | None = self.problem.rates[0]
        while rate is not None:
            result = results.find(self.training(rate, SELECTION_SEED, SELECTION))
            if result is None:
                break
            errors[rate] = result.error
            rate = next_rate(self.problem.rates, errors)
        return errors

    def chosen(self, results: Results) -> float | None:
        """The learning rate of the final trainings; None if it is not known yet."""
        errors = self.tried(results)
        return best_rate(errors) if next_rate(self.problem.rates, errors) is None else None

    def final(self, results: Results) -> dict[int, Result]:
        """The results of the final trainings that have ended, by seed."""
        rate = self.chosen(results)
        if rate is None:
            return {}
        found = {seed: results.find(self.training(rate, seed, TEST)) for seed in self.problem.seeds}
        return {seed: result for seed, result in found.items() if result is not None}

    def next(self, results: Results) -> Training | None:
        """Its next training; None if all have ended."""
        errors = self.tried(results)
        rate = next_rate(self.problem.rates, errors)
        if rate is not None:
            return self.training(rate, SELECTION_SEED, SELECTION)
        trainings = (self.training(best_rate(errors), seed, TEST) for seed in self.problem.seeds)
        return next((t for t in trainings if results.find(t) is None), None)


def best_rate(errors: dict[float, float]) -> float:
    """That of the smallest error; of equal ones the smallest rate."""
    return min(errors, key=lambda rate: (errors[rate], rate))


def next_rate(rates: Sequence[float], errors: dict[float, float]) -> float | None:
    """The rate to try after those in `errors`: each of `rates`, then half of the lowest or twice the highest
    until the best is neither. None if that is so."""
    left = [rate for rate in rates if rate not in errors]
    if left:
        return left[0]
    best = best_rate(errors)
    if best == min(errors) and len(errors) < MOST_RATES:
        return best / 2
    return best * 2 if best == max(errors) and len(errors) < MOST_RATES else None


def cells(problems: Sequence[Problem]) -> Iterator[Cell]:
    """All of them, in the order of training: both splits of a rule, then the next rule."""
    for problem in problems:
        for rule in problem.rules:
            for split in SPLITS:
                yield Cell(problem=problem, split=split, rule=rule)


def next_training(problems: Sequence[Problem], results: Results) -> Training | None:
    """The first that has not ended."""
    for cell in cells(problems):
        training = cell.next(results)
        if training is not None:
            return training
    return None


def trainings_left(problem: Problem, results: Results) -> int:
    """How many trainings of a problem are left at least: without further learning rates."""
    left = 0
    for cell in cells([problem]):
        tried = cell.tried(results)
        left += len([rate for rate in problem.rates if rate not in tried])
        left += len(problem.seeds) - len(cell.final(results))
    return left
