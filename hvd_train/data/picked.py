"""Some of the rows of several row ranges, addressed as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.bits import Bits
from hvd_train.data.deal import Span
from hvd_train.data.format import Array, FieldSpec, ShardInfo
from hvd_train.data.layout import Layout
from hvd_train.data.numbering import Origins
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError

_READ_BYTES = 1 << 20
"""Read at a time, with the rows between those that are picked."""

_GROUP = 1 << 12
"""Rows of which it is known how many picked ones come before them."""


@final
class Picked:
    """Those of `rows` whose bits are set, rows 0 to m - 1. Used like `Rows`.

    Holds a bit for each of `rows`, and reads what is between the first and the last of some picked rows in
    pieces of 1 MiB, of which it keeps the picked ones; of Python datasets the picked ones alone.
    """

    def __init__(self, rows: Rows, bits: Bits) -> None:
        self.rows = rows
        """All of them."""
        self.spans: tuple[Span, ...] = rows.spans
        self.fields: Mapping[str, FieldSpec] = rows.fields
        self.row_bytes = rows.row_bytes
        self.mark = hashlib.blake2b(bits.packed.tobytes(), digest_size=16).digest()
        """Tells these rows from all rows of the spans, and from others of them."""
        self._bits = bits
        self._before = bits.counts(np.append(np.arange(0, bits.size, _GROUP), bits.size))

    def __len__(self) -> int:
        return int(self._before[-1])

    def empty(self, num_rows: int) -> dict[str, Array]:
        """See `Rows.empty`."""
        return self.rows.empty(num_rows)

    def too_large(self, num_rows: int, num_bytes: int) -> DataError:
        """See `Rows.too_large`."""
        return self.rows.too_large(num_rows, num_bytes)

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """See `Rows.read`."""
        batch = self.empty(stop - start)
        self.read_into(batch, 0, start, stop)
        return batch

    def read_into(self, batch: Mapping[str, Array], at: int, start: int, stop: int) -> None:
        """See `Rows.read_into`."""
        step = max(1, _READ_BYTES // max(1, self.row_bytes))
        for numbers in self._numbers(start, stop):
            apart = np.diff(numbers) > 1 if self.rows.are_made else np.diff(numbers // step) > 0
            cuts = np.flatnonzero(apart) + 1
            for piece in np.split(numbers, cuts):
                first = int(piece[0])
                for name, values in self.rows.read(first, int(piece[-1]) + 1).items():
                    batch[name][at : at + len(piece)] = values[piece - first]
                at += len(piece)

    def numbers(self, picked: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which of all rows these picked ones are, in the same order."""
        found = np.empty(len(picked), np.int64)
        groups = np.searchsorted(self._before, picked, side="right") - 1
        for group in np.unique(groups).tolist():
            first, inside = group * _GROUP, groups == group
            set_ = np.flatnonzero(self._bits.read(first, min(first + _GROUP, self._bits.size)))
            found[inside] = first + set_[picked[inside] - self._before[group]]
        return found

    def origins(self, picked: npt.NDArray[np.int64]) -> Origins:
        """See `Rows.origins`."""
        return self.rows.origins(self.numbers(picked))

    def blocks(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ascending ranges of all rows, [blocks, 2], as ranges of the picked ones; without empty ones."""
        found = self._bits.counts(blocks.reshape(-1)).reshape(-1, 2)
        return found[found[:, 0] < found[:, 1]]

    def info(self, span: Span) -> ShardInfo:
        """See `Rows.info`."""
        return self.rows.info(span)

    def layouts(self) -> Iterator[tuple[str, Mapping[str, Layout]]]:
        """See `Rows.layouts`."""
        return self.rows.layouts()

    def close(self) -> None:
        """See `Rows.close`."""
        self.rows.close()

    def _numbers(self, start: int, stop: int) -> Iterator[npt.NDArray[np.int64]]:
        """The numbers, among all rows, of the picked rows `start` up to `stop`, some at a time."""
        group = int(np.searchsorted(self._before, start, side="right")) - 1
        while start < stop:
            first, before = group * _GROUP, int(self._before[group])
            set_ = np.flatnonzero(self._bits.read(first, min(first + _GROUP, self._bits.size)))
            inside = set_[start - before : stop - before]
            if len(inside):
                yield inside + first
                start += len(inside)
            group += 1


AnyRows = Rows | Picked
