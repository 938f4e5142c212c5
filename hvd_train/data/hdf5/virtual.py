"""Virtual datasets: their sources, each checked, and reading rows from them.

HDF5 itself reads fill values in place of a source that is missing, too short, or that it cannot open, such as
one file too many, without a word. So rows are read here from the sources, one file after the other.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

import h5py
import numpy as np

from hvd_train.data.crash import naming
from hvd_train.data.format import Array
from hvd_train.data.hdf5.chunks import DatasetReader, Range, layout_of, reopened
from hvd_train.data.hdf5.explained import CHANGED, explained
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.data.hdf5.mappings import Mapping, Source, mappings_of
from hvd_train.data.hdf5.selections import index_of, inner_size
from hvd_train.data.layout import HELD_BYTES, Layout

_MAX_OPEN = 8
"""Source files that a reader keeps open."""

_PIECE_BYTES = 64 << 20
"""Rows of a source that are in memory at a time, if they are not read to where they belong at once."""


@final
class Virtual:
    """The rows of a virtual dataset.

    Args:
        files: opens the files of its sources.
        depth: of virtual datasets that have this one as a source.

    Raises `UnsupportedShard` and `DataError` for sources that are missing, too short, not to be read, or not
    laid out by rows.
    """

    def __init__(self, dataset: h5py.Dataset, files: LinkedFiles, depth: int = 1) -> None:
        self._files = files
        self._mappings = mappings_of(dataset, files, depth)
        self.shape: tuple[int, ...] = tuple(map(int, dataset.shape))
        self._fill = np.asarray(dataset.fillvalue)
        self._firsts = np.array([m.virtual[0].start for m in self._mappings], np.int64)
        self._stops = np.array([m.stop for m in self._mappings], np.int64)
        self._readers: OrderedDict[Source, _SourceReader] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of all source files."""
        return sum(os.path.getsize(path) for path in {m.source.path for m in self._mappings})

    @property
    def mappings(self) -> Sequence[Mapping]:
        """Which rows are where."""
        return self._mappings

    def layout(self, itemsize: int) -> Layout:
        """As if its chunks were whole rows, as many as the largest chunks of its sources have."""
        rows = max((m.chunk_rows for m in self._mappings), default=0)
        return Layout(
            shape=self.shape,
            itemsize=itemsize,
            chunk=(min(rows, max(1, self.shape[0])), *self.shape[1:]) if rows else None,
            filtered=any(m.source.filtered for m in self._mappings),
        )

    def read_into(self, ranges: Sequence[Range], out: Array) -> None:
        """Reads the rows of `ranges`, in ascending order, into `out`, C-contiguous, of shape [rows, *shape]
        with as many rows as they have together; values are converted to its dtype."""
        fill = self._fill
        out[...] = fill[list(out.dtype.names)] if out.dtype.names else fill
        at = 0
        for start, stop in ranges:
            for number in np.flatnonzero((self._firsts < stop) & (self._stops > start)):
                self._read(self._mappings[number], (start, stop), out[at : at + stop - start])
            at += stop - start

    def close(self) -> None:
        """Closes the files of its sources; a later read opens them again."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _read(self, mapping: Mapping, rows: Range, out: Array) -> None:
        """Reads what one mapping has of `rows` into `out`, which has them all."""
        reader = self._reader(mapping.source)
        first, last = (mapping.virtual[0].below(row) for row in rows)
        width, row_bytes = inner_size(mapping.virtual), mapping.source.row_bytes(out.dtype.itemsize)
        step = max(1, _PIECE_BYTES // max(1, row_bytes * mapping.rows_of_source))
        if mapping.has_whole_rows and mapping.virtual[0].is_contiguous:
            where = mapping.virtual[0].part(first, last, rows[0])
            reader.read_into(mapping.chosen[0].ranges(first, last), out[where])
            return
        for begin in range(first, last, step):
            end = min(begin + step, last)
            values = _taken(reader, mapping, begin * width, end * width, out.dtype)
            inner = [axis.part(0, axis.size or 0) for axis in mapping.virtual[1:]]
            index = index_of([mapping.virtual[0].part(begin, end, rows[0]), *inner])
            out[index] = values.reshape(end - begin, *(axis.size or 0 for axis in mapping.virtual[1:]))

    def _reader(self, source: Source) -> _SourceReader:
        reader = self._readers.pop(source, None)
        if reader is None:
            reader = _SourceReader(source, self._files)
            while self._readers and (len(self._readers) >= _MAX_OPEN or self._held(reader) > HELD_BYTES):
                self._readers.popitem(last=False)[1].close()
        self._readers[source] = reader
        return reader

    def _held(self, reader: _SourceReader) -> int:
        return sum(r.held_bytes for r in (reader, *self._readers.values()))


def _taken(reader: _SourceReader, mapping: Mapping, first: int, last: int, dtype: np.dtype[Any]) -> Array:
    """Values `first` up to `last` of those that a mapping chooses of its source, [values]."""
    width = inner_size(mapping.chosen)
    begin, end = first // width, -(-last // width)
    rows: Array = np.empty((end - begin, *mapping.source.shape[1:]), dtype)
    reader.read_into(mapping.chosen[0].ranges(begin, end), rows)
    inner = [axis.part(0, axis.size or 0) for axis in mapping.chosen[1:]]
    chosen: Array = rows[index_of([slice(0, end - begin), *inner])].reshape(-1)
    return chosen[first - begin * width : last - begin * width]


@final
class _SourceReader:
    """One source, open."""

    def __init__(self, source: Source, files: LinkedFiles) -> None:
        self._source = source
        self._files = files.another()
        self._call = naming(source.path)
        self._virtual: Virtual | None = None
        self.held_bytes = 0
        try:
            with explained(source.where, CHANGED):
                dataset = source.open(self._files)
                if dataset.is_virtual:
                    self._virtual = Virtual(dataset, self._files, source.depth + 1)
                    return
                layout = layout_of(dataset, dataset.id.get_type().get_size())
                (dataset,) = reopened([(dataset, layout.cache_bytes)])
            self._reader = DatasetReader(dataset, layout, self._call)
            self.held_bytes = layout.held_bytes
        except BaseException:
            self._files.close()
            raise

    def read_into(self, ranges: Sequence[Range], out: Array) -> None:
        """As `Virtual.read_into`. Raises `DataError` that names the file of the source."""
        if not out.size:
            return
        if self._virtual is not None:
            self._virtual.read_into(ranges, out)
            return
        rows = f"rows {ranges[0][0]} to {ranges[-1][1] - 1}"
        with explained(f"{self._source.where}, {rows}", CHANGED):
            self._reader.read_into(ranges, out)

    def close(self) -> None:
        if self._virtual is not None:
            self._virtual.close()
        self._files.close()
