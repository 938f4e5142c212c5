"""Rows of any length in an HDF5 file, whatever it has them in; and the field that pads them to one length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.hdf5.chunks import Range
from hvd_train.data.hdf5.extent import Obstacle, converted
from hvd_train.data.hdf5.field import Field, Part
from hvd_train.data.layout import Layout, Whole
from hvd_train.data.places import Place
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.liveness import mark

Numbers = npt.NDArray[np.int64]

_PIECE_BYTES = 4 << 20
"""Of padded rows that are read at a time."""

_PIECE_ROWS = 1 << 16
"""The same, however short they are."""


class RaggedRows(ABC):
    """The rows. Every method that reads raises `DataError` for rows that are damaged."""

    name: str
    """What a message calls them: the dataset, and the one with their bounds."""

    num_rows: int

    value: FieldSpec
    """One value of a row."""

    unpacked: str
    """What the attributes of the dataset do to its values; empty if nothing."""

    stored: Layout | None = None
    """How the values are stored, one a row; None if that does not matter to those who read rows."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """What it opens."""

    @property
    @abstractmethod
    def dataset(self) -> h5py.Dataset:
        """The one with the values."""

    @abstractmethod
    def extents(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        """Of these rows, where each begins and how many values it has, [rows] each. What a beginning counts
        is for `read` alone."""

    @abstractmethod
    def read(self, starts: Numbers, lengths: Numbers, kept: Numbers) -> Array:
        """The first `kept` values of each of these rows, one row after the other: [sum of `kept`, ...].

        Args:
            starts, lengths: from `extents`, of adjacent rows.
        """


@final
class PaddedField:
    """A field whose rows are padded with zeros to one length; or the one that marks their values.

    Raises `UnsupportedShard` on construction for a place without a length to pad to.
    """

    def __init__(self, path: str, name: str, rows: RaggedRows, place: Place) -> None:
        self._where = f"{path}: {rows.name}"
        self.path = path
        """Of the shard, or of the file that a link of it leads to."""
        self._rows = rows
        self.axis = 0
        self.is_whole = False
        self.num_rows = rows.num_rows
        """Samples."""
        self.unpacked = rows.unpacked
        """What the attributes of the dataset do to its values; empty if nothing."""
        if place.padding is None:
            raise UnsupportedShard(self._refusal())
        self._padding = place.padding
        value, length, marks = rows.value, place.padding.length, place.padding.marks
        self.spec = FieldSpec(
            shape=(length,) if marks else (length, *value.shape),
            dtype="bool" if marks else value.dtype,
            place="" if str(place) == name else str(place),
            axis=place.axis,
            follow_links=place.follow_links,
            coding=None if marks else value.coding,
            padding=place.padding,
        )
        """A sample."""
        self.layout = self._layout(None if marks else rows.stored)
        """That of padded rows: chunked only if the values are in large compressed chunks."""

    def _layout(self, stored: Layout | None) -> Layout:
        itemsize = np.dtype(self.spec.dtype).itemsize
        padded = Layout(shape=(self.num_rows, *self.spec.shape), itemsize=itemsize)
        if stored is None or stored.chunk is None or not (stored.is_large and stored.filtered):
            return padded
        own = Whole(
            shape=stored.shape,
            chunk=stored.chunk,
            itemsize=stored.itemsize,
            band_chunks=stored.band_chunks,
        )
        rows = max(1, stored.band_rows * self.num_rows // max(1, stored.shape[0]))
        return replace(
            padded,
            chunk=(rows, *self.spec.shape),
            filtered=True,
            whole=stored.whole or own,
            dataset=stored.dataset,
            file=stored.file,
        )

    @property
    def parts(self) -> Sequence[Part]:
        """What it opens."""
        return self._rows.parts

    @property
    def dataset(self) -> h5py.Dataset:
        """The one with the values; for its attributes."""
        return self._rows.dataset

    def close(self) -> None:
        """Closes the files that the values are read from, but for the shard itself."""
        for part in self.parts:
            if isinstance(part, Field):
                part.close()

    def extent(self, path: str) -> Obstacle:
        """Why the rows cannot be read without the HDF5 library."""
        return converted("holds rows of any length")

    def read_into(self, ranges: Sequence[Range], out: Array) -> None:
        """Reads the rows of `ranges`, in ascending order, into `out`, of shape [rows, *shape] with as many
        rows as they have together; values are converted to its dtype."""
        at, step = 0, max(1, min(_PIECE_ROWS, _PIECE_BYTES // max(1, self.layout.row_bytes)))
        for first, last in ranges:
            for start, stop in _cut(first, last, step):
                self._read(start, stop, out[at : at + stop - start])
                at += stop - start
                mark()

    def check_lengths(self, start: int, stop: int) -> None:
        """Raises `DataError` for the first of these rows that is damaged, or longer than is allowed."""
        for first, last in _cut(start, stop, _PIECE_ROWS):
            self._extents(first, last)
            mark()

    def _read(self, start: int, stop: int, out: Array) -> None:
        starts, lengths = self._extents(start, stop)
        kept = np.minimum(lengths, self._padding.length)
        marks = np.arange(self._padding.length) < kept[:, np.newaxis]
        if self._padding.marks:
            out[...] = marks
            return
        out[...] = 0
        if kept.any():
            out[marks] = self._rows.read(starts, lengths, kept)

    def _extents(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        starts, lengths = self._rows.extents(start, stop)
        long = lengths > self._padding.length
        if long.any() and not self._padding.truncate:
            row = int(long.argmax())
            raise DataError(self._too_long(int(lengths[row]), start + row))
        return starts, lengths

    def _too_long(self, length: int, row: int) -> str:
        most, _ = self._longest()
        return (
            f"{self._where} has {length:,} values in row {row}; expected at most {self._padding.length:,}, "
            f"the given length. Set data.max_length = {most}, the length of the longest row of this file, or "
            "more, or cut such rows by data.truncate = true."
        )

    def _refusal(self) -> str:
        most, row = self._longest()
        held = f", the longest of {most:,} values in row {row}" if most else ", all of them empty"
        return (
            f"{self._where} holds rows of variable length ({self._rows.value.dtype}){held}. Expected a "
            f"length to which they are padded with zeros: set data.max_length = {max(1, most)} or more "
            f"(for `shard info` and `shard check`, --max-length {max(1, most)})."
        )

    def _longest(self) -> tuple[int, int]:
        """The length of the longest row, and its number."""
        most, row = 0, 0
        for start, stop in _cut(0, self.num_rows, _PIECE_ROWS):
            _, lengths = self._rows.extents(start, stop)
            if lengths.max() > most:
                most, row = int(lengths.max()), start + int(lengths.argmax())
            mark()
        return most, row


def _cut(start: int, stop: int, step: int) -> Iterator[Range]:
    return ((first, min(first + step, stop)) for first in range(start, stop, step))
