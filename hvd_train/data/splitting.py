"""Which part of a data set each row is for: by a fraction of all rows, of each class, or of the groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.shuffling import random_keys
from hvd_train.data.sources.base import GROUP, Block
from hvd_train.errors import DataError
from hvd_train.io.text import counted

_STRETCH = 1000
"""Rows of a stratum of which each part gets its share."""

_ROUNDINGS, _FIRST_STREAM = 1, 2
"""Numbers of the streams of random numbers: of the roundings, and of the first stratum. Number 0 shuffles."""


def parse_split(text: str) -> dict[str, float]:
    """`validation=0.1,test=0.1` as a mapping. Raises `DataError`."""
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = item.strip().partition("=")
        try:
            fraction = float(number)
        except ValueError:
            fraction = 0.0
        if not name.isidentifier() or name in parts or name == "train" or not 0 < fraction < 1:
            raise DataError(
                f"--split {text}: {item.strip()!r} is not a part and its fraction. Expected such as "
                "`validation=0.1` or `validation=0.1,test=0.1`, with each part once and not `train`, which "
                "gets the rest."
            )
        parts[name] = fraction
    if sum(parts.values()) >= 1:
        raise DataError(f"--split {text}: the fractions add up to 1 or more. Leave rows for `train`.")
    return parts


class Splitter(ABC):
    """Says for each row, in order, which part it is for: a number from 0, the part that gets the rest."""

    @property
    @abstractmethod
    def needed(self) -> tuple[str, ...]:
        """The fields of a block that it looks at."""

    @abstractmethod
    def parts_of(self, block: Block) -> npt.NDArray[np.intp]:
        """For the next rows."""

    @abstractmethod
    def sizes(self) -> list[int]:
        """Rows of each part."""


@final
class ByFraction(Splitter):
    """A share of each stratum, within one row: of every class, or of all rows as a single stratum.

    The rows are chosen at random by the seed, the same share of every 1,000 of a stratum.

    Args:
        fractions: of the parts after the first.
        counts: rows of each stratum, by its value; of all rows if `field` is None, by the key 0.
        field: whose value is the stratum.
    """

    def __init__(
        self, fractions: Sequence[float], counts: Mapping[int, int], field: str | None, seed: int
    ) -> None:
        self._bounds = np.cumsum(fractions)
        self._counts = counts
        self._field = field
        self._seed = seed
        self._seen = dict.fromkeys(counts, 0)
        # Small strata are rounded up or down at random: if all were rounded down, a part would get none.
        keys = random_keys(seed, np.arange(len(counts)), _ROUNDINGS)
        roundings = [0.5] if field is None else (keys >> np.uint64(11)) / 2.0**53
        self._roundings = dict(zip(counts, roundings, strict=True))
        self._places = {stratum: place for place, stratum in enumerate(counts, _FIRST_STREAM)}
        self._stretches: dict[int, npt.NDArray[np.intp]] = {}

    @property
    def needed(self) -> tuple[str, ...]:
        return () if self._field is None else (self._field,)

    def sizes(self) -> list[int]:
        ends = np.array([self._ends(stratum, count) for stratum, count in self._counts.items()]).sum(axis=0)
        others = np.diff(ends, prepend=0).tolist()
        return [sum(self._counts.values()) - sum(others), *others]

    def parts_of(self, block: Block) -> npt.NDArray[np.intp]:
        length = len(next(iter(block.values())))
        values = np.zeros(length, np.int64) if self._field is None else block[self._field]
        parts = np.empty(length, np.intp)
        order = np.argsort(values, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
            if len(rows):
                parts[rows] = self._next(int(values[rows[0]]), len(rows))
        return parts

    def _next(self, stratum: int, count: int) -> npt.NDArray[np.intp]:
        """The parts of the next rows of a stratum."""
        pieces = []
        while count:
            seen = self._seen[stratum]
            at = seen % _STRETCH
            if at == 0:
                self._stretches[stratum] = self._stretch(stratum, seen)
            piece = self._stretches[stratum][at : at + count]
            pieces.append(piece)
            self._seen[stratum] = seen + len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def _stretch(self, stratum: int, start: int) -> npt.NDArray[np.intp]:
        """The parts of the rows of a stratum from its row `start` on."""
        stop = min(start + _STRETCH, self._counts[stratum])
        upto = self._ends(stratum, stop) - self._ends(stratum, start)
        keys = random_keys(self._seed, np.arange(start, stop), self._places[stratum])
        ranks = np.argsort(np.argsort(keys))
        part = np.searchsorted(upto, ranks, side="right") + 1
        return np.asarray(np.where(part > len(upto), 0, part), np.intp)

    def _ends(self, stratum: int, count: int) -> npt.NDArray[np.int64]:
        """Of the first `count` rows of a stratum, those of the first part, of the first two, and so on."""
        ends = self._bounds * count + self._roundings[stratum]
        return np.asarray(np.floor(ends), np.int64)


@final
class ByGroup(Splitter):
    """Whole groups: all rows with the same value of a field are in one part.

    In an order that the seed decides, each group goes to the part that lacks most rows of its share.

    Args:
        names: of all parts, that of the rest first.
        fractions: of the parts after the first.
        counts: rows of each group.
        name: of the field with the groups, for messages.

    Raises `DataError` where a part gets no group.
    """

    def __init__(
        self,
        names: Sequence[str],
        fractions: Sequence[float],
        counts: Mapping[int, int],
        name: str,
        seed: int,
    ) -> None:
        total = sum(counts.values())
        lacking = [total * (1 - sum(fractions)), *(total * fraction for fraction in fractions)]
        self._sizes = [0] * len(names)
        values = np.array(list(counts), np.int64)
        self._groups = np.sort(values)
        self._parts = np.zeros(len(values), np.intp)
        for place in np.argsort(random_keys(seed, values)):
            size = counts[int(values[place])]
            part = int(np.argmax(lacking))
            lacking[part] -= size
            self._sizes[part] += size
            self._parts[np.searchsorted(self._groups, values[place])] = part
        empty = [part for part, size in zip(names, self._sizes, strict=True) if not size]
        if empty:
            raise DataError(
                f"--group {name}: {counted(len(counts), 'group')}, none of them for the part `{empty[0]}`. "
                "Expected a group for each part at least: leave out the part, or give it a larger fraction."
            )

    @property
    def needed(self) -> tuple[str, ...]:
        return (GROUP,)

    def sizes(self) -> list[int]:
        return self._sizes

    def parts_of(self, block: Block) -> npt.NDArray[np.intp]:
        places = np.searchsorted(self._groups, block[GROUP])
        return np.asarray(self._parts[places], np.intp)
