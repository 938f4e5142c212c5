"""Rows of any length, the values of all of them in one dataset and their bounds in another.

Awkward arrays, Arrow and CSR matrices have offsets, of one number more than rows; torch's EmbeddingBag and
NeXus have where each row begins; others have its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, final

import h5py
import numpy as np

from hvd_train.data.format import Array
from hvd_train.data.hdf5.field import Field
from hvd_train.data.hdf5.ragged import Numbers, RaggedRows
from hvd_train.data.places import Kind
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import shown

_STEP = 4096
"""Of lengths, sums are held for rows at multiples of this number."""

_READ_ROWS = 1 << 20


@final
class PackedRows(RaggedRows):
    """Rows of a field of values.

    Args:
        path: of the shard, for messages.
        values: all of them, one a row of the field.
        bounds: the numbers.
        kind: what they are.

    Raises `UnsupportedShard` for bounds that are not one integer a row.
    """

    def __init__(self, path: str, values: Field, bounds: Field, kind: Kind) -> None:
        self.value, self.unpacked, self.stored = values.spec, values.unpacked, values.layout
        self._values, self._bounds, self._kind = values, bounds, kind
        self._bounds_name = shown(bounds.dataset.name.strip("/"))
        self._named = f"{path}: dataset `{self._bounds_name}`"
        self._values_named = f"`{shown(values.dataset.name.strip('/'))}`"
        self.name = f"dataset {self._values_named}, by the {kind} in `{self._bounds_name}`,"
        one_more = kind == "offsets"
        if bounds.spec.shape or np.dtype(bounds.spec.dtype).kind not in "iu" or bounds.num_rows < one_more:
            count = "rows + 1" if one_more else "rows"
            seen = f"{bounds.spec.dtype} {[bounds.num_rows, *bounds.spec.shape]}"
            raise UnsupportedShard(
                f"{self._named} is {seen}; expected integers [{count}], the {kind} of rows in "
                f"{self._values_named}. Name such a dataset, or write it again."
            )
        self.num_rows = bounds.num_rows - one_more
        self._sums: Numbers | None = None

    @property
    def parts(self) -> Sequence[Field]:
        """What it opens."""
        return (self._values, self._bounds)

    @property
    def dataset(self) -> h5py.Dataset:
        """The one with the values."""
        return self._values.dataset

    def extents(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        if self._kind == "lengths":
            lengths = self._lengths(start, stop)
            return self._start_of(start) + np.cumsum(lengths) - lengths, lengths
        edges = self._numbers(start, min(stop + 1, self._bounds.num_rows))
        total = self._values.num_rows
        if self._kind == "starts" and stop == self.num_rows:
            edges = np.append(edges, total)
        outside = (edges < 0) | (edges > total)
        if outside.any():
            at = int(outside.argmax())
            self._refuse(f"{edges[at]} in row {start + at}", f"0 to {total}, the number of values")
        lengths = np.diff(edges)
        if (lengths < 0).any():
            at = int((lengths < 0).argmax())
            self._refuse(f"{edges[at]} in row {start + at} and then {edges[at + 1]}", "numbers that grow")
        if start == 0 and edges[0] != 0:
            self._refuse(f"{edges[0]} in row 0", "0 there")
        if stop == self.num_rows and edges[-1] != total:
            more = f"If it has the start of each row alone, name it as `starts={self._bounds_name}`. "
            self._refuse(f"{edges[-1]} at its end", f"{total}, the number of values", more)
        return edges[:-1], lengths

    def read(self, starts: Numbers, lengths: Numbers, kept: Numbers) -> Array:
        field = self._values.spec
        out: Array = np.empty((int(kept.sum()), *field.shape), np.dtype(field.dtype))
        starts, ends = starts[kept > 0], (starts + kept)[kept > 0]
        # Adjacent rows, of which nothing is cut, are one range.
        apart = np.flatnonzero(starts[1:] != ends[:-1])
        firsts, lasts = starts[np.append(0, apart + 1)], ends[np.append(apart, len(ends) - 1)]
        self._values.read_into(list(zip(firsts.tolist(), lasts.tolist(), strict=True)), out)
        return out

    def _numbers(self, start: int, stop: int) -> Numbers:
        found: Array = np.empty(stop - start, np.dtype(self._bounds.spec.dtype))
        if start < stop:
            self._bounds.read_into([(start, stop)], found)
        return found.astype(np.int64)

    def _lengths(self, start: int, stop: int) -> Numbers:
        lengths, total = self._numbers(start, stop), self._values.num_rows
        wrong = (lengths < 0) | (lengths > total)
        if wrong.any():
            at = int(wrong.argmax())
            self._refuse(f"{lengths[at]} in row {start + at}", f"0 to {total}, the number of values")
        return lengths

    def _start_of(self, row: int) -> int:
        """By sums over all rows before it, of which those at multiples of `_STEP` are kept. Reads all lengths
        when it is first called."""
        if self._sums is None:
            sums = [np.zeros(1, np.int64)]
            for start in range(0, self.num_rows, _READ_ROWS):
                lengths = self._lengths(start, min(start + _READ_ROWS, self.num_rows))
                sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), _STEP)))
            self._sums = np.cumsum(np.concatenate(sums))
            if self._sums[-1] != self._values.num_rows:
                seen = f"numbers that add up to {self._sums[-1]}"
                self._refuse(seen, f"{self._values.num_rows}, the number of values")
        before = row // _STEP
        return int(self._sums[before] + self._lengths(before * _STEP, row).sum())

    def _refuse(self, seen: str, expected: str, more: str = "") -> NoReturn:
        raise DataError(
            f"{self._named} holds {seen}; expected {expected}, as {self._kind} of rows in "
            f"{self._values_named}. {more}Correct it, or write the file again."
        )
