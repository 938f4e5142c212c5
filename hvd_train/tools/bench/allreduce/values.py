"""What the ranks combine, and whether what they get is right: values that differ by rank and by element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hvd_train.comm.buffer import slice_bounds
from hvd_train.errors import CommunicationError

_MODULI = (1021, 13)
"""Primes, so that no slice or segment of whole cache lines has the values of another."""

_PERIOD = _MODULI[0] * _MODULI[1]
_SAMPLES = 1000


def weight(rank: int) -> float:
    """The rank's weight in a mean: another one for each, so that a wrong one is seen."""
    return 1.0 + rank


def spread(size: int) -> float:
    """The most by which values of two of `size` ranks differ."""
    return float(_MODULI[1] * (size - 1))


def _terms() -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers a, b, float64 [_PERIOD]: element i of rank r is a[i] + r b[i], i modulo the period."""
    index = np.arange(_PERIOD)
    return (index % _MODULI[0]).astype(np.float64), 1.0 + index % _MODULI[1]


class Values:
    """The values of one rank."""

    def __init__(self, rank: int) -> None:
        a, b = _terms()
        self._period = (a + rank * b).astype(np.float32)

    def write(self, live: Tensor) -> None:
        """live, float32 [numel], := the values."""
        rows, rest = _rows(live)
        rows[:] = self._period
        rest[:] = self._period[: len(rest)]


def _rows(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Its whole periods, as rows, and the elements after them."""
    array = tensor.numpy()
    whole = len(array) // _PERIOD * _PERIOD
    return array[:whole].reshape(-1, _PERIOD), array[whole:]


class Expected:
    """What the values of some ranks are combined to.

    Args:
        ranks: whose values.
        mean: their mean, each by its `weight`; else their sum.
        calls: how often; the second call takes what the first left on every rank.
        slack: what an element may be off beside what a sum in float32 loses.
    """

    def __init__(self, ranks: Sequence[int], *, mean: bool, calls: int, slack: float = 0.0) -> None:
        a, b = _terms()
        if mean:
            total = sum(map(weight, ranks))
            self._exact = a + b * sum(weight(r) * r for r in ranks) / total
        else:
            self._exact = (len(ranks) * a + sum(ranks) * b) * float(len(ranks)) ** (calls - 1)
        off = 1e-6 * len(ranks) * self._exact + slack
        self._low, self._high = self._exact - off, self._exact + off

    def check(self, tensor: Tensor, what: str, parts: int, *, thorough: bool) -> None:
        """Checks all elements of `tensor`, float32 [numel], or samples: the ends of its `parts` slices
        and a thousand between them. Raises `CommunicationError` for a wrong one."""
        index = self._suspects(tensor) if thorough else _samples(tensor.numel(), parts)
        found, at = tensor.numpy()[index], index % _PERIOD
        wrong = np.flatnonzero(~((found >= self._low[at]) & (found <= self._high[at])))
        if wrong.size:
            first = wrong[0]
            raise CommunicationError(
                f"{what}: element {index[first]} of {tensor.numel()} is {found[first]:g}; expected "
                f"{self._exact[at[first]]:g}. No figure is given for a wrong result."
            )

    def _suspects(self, tensor: Tensor) -> np.ndarray:
        """Indices of the elements that are not known to be right once the whole rows are checked: those of
        the first bad row, else those after the last row."""
        rows, rest = _rows(tensor)
        for number, row in enumerate(rows):
            if not ((row >= self._low) & (row <= self._high)).all():
                return np.arange(number * _PERIOD, (number + 1) * _PERIOD)
        return np.arange(tensor.numel() - len(rest), tensor.numel())


def _samples(numel: int, parts: int) -> np.ndarray:
    starts = np.array([slice_bounds(numel, parts, r)[0] for r in range(parts)])
    ends = np.concatenate([starts, starts - 1])
    between = np.linspace(0, numel - 1, min(numel, _SAMPLES)).astype(np.int64)
    return np.union1d(between, ends[(ends >= 0) & (ends < numel)])
