"""Reading what can be read of rows some of which are damaged, and which these are. Nothing is opened here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hvd_train.data.format import Array
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import listed

Range = tuple[int, int]
"""Rows of a file: the first, and the one after the last."""

_LISTED = 12


class Unread(NamedTuple):
    """Rows that cannot be read."""

    rows: Range
    at: int
    """Where the first of them is in the arrays."""
    error: DataError


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The rows of a file that cannot be read, or are not what was written."""

    path: str
    ranges: tuple[Range, ...]
    """In ascending order; none is next to another."""
    reason: str
    """The message of the first read that failed."""

    def joined(self, ranges: Sequence[Range]) -> Damage:
        """With these rows, too."""
        merged: list[Range] = []
        for start, stop in sorted((*self.ranges, *ranges)):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return replace(self, ranges=tuple(merged))

    def __str__(self) -> str:
        rows = [f"{start} to {stop - 1}" if stop - start > 1 else str(start) for start, stop in self.ranges]
        return f"{self.reason} Left out of training: rows {listed(rows, _LISTED)}."


def read_undamaged(
    read: Callable[[Range, Array], None], rows: Range, out: Array, unit: int
) -> Iterator[tuple[Range, DataError]]:
    """Reads `rows` into `out`; where that fails, each half of them, down to one unit. Yields the units, or
    parts of one, that cannot be read; their rows are 0.

    Args:
        read: reads some rows; raises `DataError`.
        unit: rows that are damaged together: units begin at multiples of it.
    """
    try:
        read(rows, out)
        return
    except UnsupportedShard:
        raise
    except DataError as error:
        start, stop = rows
        middle = round((start + stop) / 2 / unit) * unit
        if not start < middle < stop:
            middle = (start // unit + 1) * unit  # the only place that may be left
        if middle >= stop:
            out.fill(0)
            yield rows, error
            return
    yield from read_undamaged(read, (start, middle), out[: middle - start], unit)
    yield from read_undamaged(read, (middle, stop), out[middle - start :], unit)
