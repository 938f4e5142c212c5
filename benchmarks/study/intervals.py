"""Means and differences with the 95 % interval of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""By the number of values: the 97.5 % quantile of Student's t with one degree of freedom less."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    half: float
    """Half of its width."""

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is not in it."""
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of 2 to 10 values."""
    return Interval(
        statistics.mean(values), T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    )


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Of the mean difference between values and base of the same seed; None with fewer than 2 seeds, and
    where a value is not finite."""
    seeds = sorted(values.keys() & base.keys())
    differences = [values[seed] - base[seed] for seed in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, differences)):
        return None
    return interval(differences)
