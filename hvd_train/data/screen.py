"""Which of the rows that are read a training leaves out: those with values that are not finite, and damaged
ones.

A batch that was screened has one more array, under `MARK`: for each row why it is left out. The marks pass
through whatever mixes rows, as every other array does, and are taken off where rows are used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from hvd_train.config import DataConfig
from hvd_train.data.blocks import row_bytes
from hvd_train.data.damage import Damage, Range
from hvd_train.data.format import Array, SampleSpec
from hvd_train.errors import DataError

MARK = ""
"""The name of the marks in a batch: uint8 [rows], `USABLE` or one of `REASONS`. No field has it."""

USABLE = 0

REASONS: Mapping[str, int] = {"not_finite": 1, "damaged": 2, "alone": 3}
"""Why a row is left out, by name. No mark is `alone`: that is a row that the others of its batch leave."""

_LARGEST = np.finfo(np.float32).max
_PIECE_BYTES = 256 << 10
"""Of values that are checked at once: they are in the processor's cache then."""

_REMEDY = (
    "Replace the value, or leave such rows out: data.not_finite = 'skip'. `hvd_train shard check` counts "
    "such values in each file."
)


@final
class Screen:
    """Marks rows as they are read. The same for every row, whatever else is read with it; one thread marks.

    Of targets only what counts matters: not those that the mask excludes, nor those of a sample of weight 0.

    Args:
        sample: what a row is; fields that are not read are not checked.
        not_finite: what becomes of a row with a value that is not finite in float32. `error`: `DataError`,
            with the row, when it is read.
        on_damage: whether rows that cannot be read are an error.
    """

    def __init__(
        self,
        sample: SampleSpec,
        *,
        not_finite: Literal["error", "skip", "keep"] = "keep",
        on_damage: Literal["error", "skip"] = "error",
    ) -> None:
        self._sample = sample
        self._not_finite = not_finite
        self.skips_damage = on_damage == "skip"
        """Whether rows that cannot be read are left out."""
        self._lock = threading.Lock()
        self._first = ""
        self._damage: dict[str, Damage] = {}
        self._reported: dict[str, Damage] = {}

    @property
    def first_not_finite(self) -> str:
        """Of the rows that are left out, where the first one was that was read; empty if there is none."""
        with self._lock:
            return self._first

    def leave_out(self, path: str, rows: Range, reason: str, marks: Array) -> None:
        """Marks rows of a file that cannot be read, all those of `marks`."""
        marks.fill(REASONS["damaged"])
        with self._lock:
            known = self._damage.get(path) or Damage(path=path, ranges=(), reason=reason)
            self._damage[path] = known.joined([rows])

    def unreported_damage(self, *, new_files: bool) -> list[Damage]:
        """The damage of each file of which this method has given none, or also of those of which more was
        found since then."""
        with self._lock:
            found = dict(self._damage)
        news = [d for path, d in found.items() if path not in self._reported]
        if not new_files:
            news = [d for path, d in found.items() if d != self._reported.get(path)]
        self._reported |= {damage.path: damage for damage in news}
        return news

    def mark(self, path: str, ranges: Sequence[Range], part: Mapping[str, Array], marks: Array) -> None:
        """Marks the rows of `part` that are not finite. Raises `DataError` if they are an error.

        Args:
            path, ranges: where they are.
            part: {name: array [rows, *shape]}.
            marks: uint8 [rows]; rows that are marked already stay so.
        """
        if self._not_finite == "keep":
            return
        size = max(1, sum(row_bytes(self._sample.fields[name]) for name in part))
        step = max(1, _PIECE_BYTES // size)
        for start in range(0, len(marks), step):
            piece = {name: array[start : start + step] for name, array in part.items()}
            if all(map(is_finite, piece.values())):
                continue
            mark = marks[start : start + step]
            for index, where in self._bad_rows(piece):
                if mark[index] == USABLE:
                    self._take(f"{path}: {where} in row {_row_at(ranges, start + index)}")
                    mark[index] = REASONS["not_finite"]

    def _take(self, where: str) -> None:
        if self._not_finite == "error":
            raise DataError(f"{where}; expected finite numbers. {_REMEDY}")
        with self._lock:
            self._first = self._first or where

    def _bad_rows(self, part: Mapping[str, Array]) -> list[tuple[int, str]]:
        """The rows with a value that is not finite, and for each the first such value."""
        found: dict[int, str] = {}
        for name, array in part.items():
            if array.dtype.kind != "f":
                continue
            flat = array.reshape(len(array), -1)
            bad = ~(np.abs(flat) <= _LARGEST)
            if name == self._sample.targets != self._sample.inputs:
                bad &= self._counts(part, flat.shape)
            for row in np.flatnonzero(bad.any(axis=1)).tolist():
                value = float(flat[row, bad[row].argmax()])
                beyond = ", too large for float32" if np.isfinite(value) else ""
                found.setdefault(row, f"`{name}` holds {value:g}{beyond}")
        return sorted(found.items())

    def _counts(self, part: Mapping[str, Array], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Which of the targets count, bool [rows, components]."""
        counts = np.ones(shape, bool)
        mask, weights = (part.get(name) for name in (self._sample.mask, self._sample.weights))
        if mask is not None:
            counts &= mask.reshape(shape) != 0
        if weights is not None:
            counts &= weights.reshape(-1, 1) != 0
        return counts


def training_screen(data: DataConfig, sample: SampleSpec) -> Screen | None:
    """Of rows to train on, as a configuration asks for it; None where no row is left out."""
    if (data.not_finite, data.on_damage) == ("keep", "error"):
        return None
    return Screen(sample, not_finite=data.not_finite, on_damage=data.on_damage)


def evaluation_screen(data: DataConfig, sample: SampleSpec) -> Screen | None:
    """Of rows to evaluate on. Damage is an error there: the figures would be those of other data."""
    return None if data.not_finite == "keep" else Screen(sample, not_finite=data.not_finite)


def damage_screen(data: DataConfig, sample: SampleSpec) -> Screen | None:
    """Of rows that are summarized before the training: without those that cannot be read."""
    return Screen(sample, on_damage="skip") if data.on_damage == "skip" else None


def is_finite(array: Array) -> bool:
    """Whether every value is finite in float32. Integers are."""
    if array.dtype.kind != "f":
        return True
    if array.dtype.itemsize <= 4:
        return bool(np.isfinite(array).all())
    return bool((np.abs(array) <= _LARGEST).all())


def usable(batch: dict[str, Array]) -> tuple[dict[str, Array], npt.NDArray[np.intp], dict[str, int]]:
    """What of a batch is used.

    Returns the batch without its marks, and without the rows that are left out: copies, unless that is none;
    the numbers of the rows that are left in the batch; and how many are not, by reason. A batch without marks
    is returned as it is.
    """
    marks = batch.get(MARK)
    rest = {name: array for name, array in batch.items() if name != MARK}
    if marks is None or not marks.any():
        return rest, np.arange(len(next(iter(rest.values())))), {}
    kept = np.flatnonzero(marks == USABLE)
    counts = np.bincount(marks, minlength=len(REASONS) + 1)
    left_out = {name: int(counts[mark]) for name, mark in REASONS.items() if counts[mark]}
    return {name: array[kept] for name, array in rest.items()}, kept, left_out


def stretches(batch: Mapping[str, Array]) -> Iterator[tuple[int, int]]:
    """The rows of a batch that are used, as ranges."""
    marks = batch.get(MARK)
    if marks is None:
        yield 0, len(next(iter(batch.values())))
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[True], marks != USABLE, [True]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _row_at(ranges: Sequence[Range], index: int) -> int:
    """The row of the file that is at `index` of the rows of `ranges` together."""
    for start, stop in ranges:
        if index < stop - start:
            return start + index
        index -= stop - start
    raise IndexError(index)
