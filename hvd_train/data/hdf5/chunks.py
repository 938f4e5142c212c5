"""Reading rows of one dataset with chunks of any shape: in bounded memory, and each chunk about once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import h5py
import numpy as np

from hvd_train.data.format import Array
from hvd_train.data.layout import Box, Layout
from hvd_train.liveness import mark

Range = tuple[int, int]
"""Rows of a dataset: the first, and the one after the last."""

Read = Callable[[Sequence[Range], Array], None]
"""Reads rows of some ranges into an array."""

_PIECE_BYTES = 64 << 20
"""Bytes read at a time: a rank that reads for long reports progress after each piece."""

_CHUNKS_A_READ = 4096
"""HDF5 allocates about 5 KiB for each chunk that one read touches."""

# Chunks in the cache are found by their number modulo this one: of two that meet, one is dropped.
_CACHE_SLOTS = 8191
_LEAST_RECENTLY_USED = 0.75


def layout_of(dataset: h5py.Dataset, itemsize: int) -> Layout:
    """The layout of a dataset whose values take `itemsize` bytes each in memory."""
    return Layout(
        shape=tuple(map(int, dataset.shape)),
        itemsize=itemsize,
        chunk=None if dataset.chunks is None else tuple(map(int, dataset.chunks)),
        filtered=dataset.id.get_create_plist().get_nfilters() > 0,
    )


def reopened(datasets: Sequence[tuple[h5py.Dataset, int]]) -> list[h5py.Dataset]:
    """The same datasets; those with chunks are closed, and opened with chunk caches of so many bytes.

    HDF5 takes the size of a cache when a dataset is opened, and not if it is open already: all are closed
    first, as two names may lead to one dataset.
    """
    places = [
        None if d.chunks is None else (h5py.h5i.get_file_id(d.id), h5py.h5i.get_name(d.id), size)
        for d, size in datasets
    ]
    for (dataset, _), place in zip(datasets, places, strict=True):
        if place is not None:
            dataset.id.close()
    return [
        dataset if place is None else _open(*place)
        for (dataset, _), place in zip(datasets, places, strict=True)
    ]


def _open(file: Any, path: bytes, cache_bytes: int) -> h5py.Dataset:
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(_CACHE_SLOTS, cache_bytes, _LEAST_RECENTLY_USED)
    return h5py.Dataset(h5py.h5d.open(file, path, access))


@final
class Bands:
    """Reads rows of large bands (see `Layout`): those of one band are held in memory, or as many as
    `Layout.held_rows` says, so that reading on from there decodes nothing again."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._held: Array | None = None
        self._held_from = 0

    def read_into(self, ranges: Sequence[Range], out: Array, read: Read) -> None:
        """Reads the rows of `ranges`, in ascending order, into `out`, C-contiguous, of shape [rows, *shape]
        with as many rows as they have together, by `read`, which does the same."""
        layout, at = self._layout, 0
        for first, last in _cut(ranges[0][0], ranges[-1][1], layout.band_rows):
            band = (first, min(last, layout.shape[0]))
            wanted = list(_within(ranges, band))
            rows = _num_rows(wanted)
            target = out[at : at + rows]
            if rows > layout.held_rows:  # at once, as no more can be held
                read(wanted, target)
            elif rows:
                self._read_held(wanted, band, target, read)
            at += rows

    def _read_held(self, ranges: Sequence[Range], band: Range, out: Array, read: Read) -> None:
        """Reads rows of one band, piece by piece: a whole piece into `out`, others by way of what is held."""
        first, at = band[0], 0
        for begin, end in _cut(ranges[0][0] - first, ranges[-1][1] - first, self._layout.held_rows):
            piece = (first + begin, min(first + end, band[1]))
            wanted = list(_within(ranges, piece))
            rows = _num_rows(wanted)
            if rows == piece[1] - piece[0]:
                read(wanted, out[at : at + rows])
            elif rows:
                held = self._hold(piece, out, read)
                np.concatenate(
                    [held[a - piece[0] : b - piece[0]] for a, b in wanted], out=out[at : at + rows]
                )
            at += rows

    def _hold(self, piece: Range, like: Array, read: Read) -> Array:
        """The rows of `piece`, in the dtype of `like`; reads them unless they are held."""
        held, shape = self._held, (piece[1] - piece[0], *like.shape[1:])
        if held is None or self._held_from != piece[0] or (held.shape, held.dtype) != (shape, like.dtype):
            held = self._held = None  # before there is memory for others
            rows: Array = np.empty(shape, like.dtype)
            read([piece], rows)
            held, self._held_from = rows, piece[0]
            self._held = held
        return held


@final
class DatasetReader:
    """Reads rows of an open dataset.

    Args:
        call: what every call of HDF5 goes through, as `call(action, *args)`.
    """

    def __init__(self, dataset: h5py.Dataset, layout: Layout, call: Callable[..., Any]) -> None:
        self._id = dataset.id
        self._layout = layout
        self._call = call
        self._bands = Bands(layout) if layout.is_large else None

    def read_into(self, ranges: Sequence[Range], out: Array) -> None:
        """Reads the rows of `ranges`, in ascending order, into `out`, C-contiguous, of shape [rows, *shape]
        with as many rows as they have together; values are converted to its dtype."""
        if not out.size:
            return
        if self._bands is None:
            self._read_pieces(ranges, out)
        else:
            self._bands.read_into(ranges, out, self._read_all)

    def _read_pieces(self, ranges: Sequence[Range], out: Array) -> None:
        at = 0
        for start, stop in ranges:
            for begin, end in pieces(self._layout, start, stop):
                self._read((begin, end), out[at : at + end - begin])
                at += end - begin

    def _read_all(self, ranges: Sequence[Range], out: Array) -> None:
        if not self._layout.filtered:
            self._read_pieces(ranges, out)
        elif len(ranges) == 1:
            self._read(ranges[0], out)
        else:
            self._read_copies(ranges, out, max(1, _PIECE_BYTES // self._layout.chunk_bytes))

    def _read(self, rows: Range, out: Array) -> None:
        if self._layout.is_large and not self._layout.filtered:
            self._read_copies([rows], out, 1)
            return
        memory = h5py.h5s.create_simple(out.shape)
        for box in self._layout.boxes(_CHUNKS_A_READ):
            memory.select_hyperslab(*_selection((0, len(out)), box))
            self._read_box(rows, box, memory, out)

    def _read_copies(self, ranges: Sequence[Range], out: Array, num_chunks: int) -> None:
        """Reads `ranges` and what is between them, of `num_chunks` chunks at a time, by way of memory of the
        same shape: HDF5 would go through other selections value by value."""
        rows = (ranges[0][0], ranges[-1][1])
        for box in self._layout.boxes(num_chunks):
            values: Array = np.empty(
                (rows[1] - rows[0], *(part.stop - part.start for part in box)), out.dtype
            )
            self._read_box(rows, box, h5py.h5s.create_simple(values.shape), values)
            at = 0
            for start, stop in ranges:
                where = (slice(at, at + stop - start), *box)
                out[where] = values[start - rows[0] : stop - rows[0]]
                at += stop - start

    def _read_box(self, rows: Range, box: Box, memory: Any, out: Array) -> None:
        space = self._id.get_space()
        space.select_hyperslab(*_selection(rows, box))
        self._call(self._id.read, memory, space, out)
        mark()


def _selection(rows: Range, box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where these rows of a box begin, and how many there are along each axis."""
    parts = (slice(*rows), *box)
    return tuple(part.start for part in parts), tuple(part.stop - part.start for part in parts)


def pieces(layout: Layout, start: int, stop: int) -> Iterator[Range]:
    """Row ranges of about `_PIECE_BYTES` that are together `start` to `stop`, cut where chunks end."""
    rows = max(1, _PIECE_BYTES // layout.row_bytes)
    if layout.chunk is not None:
        rows = min(rows, max(1, _CHUNKS_A_READ // layout.band_chunks) * layout.band_rows)
    # A chunk beyond the cache is read in part.
    unit = layout.band_rows if layout.band_bytes <= layout.cache_bytes else 1
    return (
        (max(start, first), min(stop, last)) for first, last in _cut(start, stop, max(1, rows // unit) * unit)
    )


def _cut(start: int, stop: int, step: int) -> Iterator[Range]:
    """The ranges between multiples of `step` that `start` to `stop` is in."""
    return ((first, first + step) for first in range(start // step * step, stop, step))


def _within(ranges: Sequence[Range], part: Range) -> Iterator[Range]:
    """What of the `ranges` is in `part`."""
    for start, stop in ranges:
        if max(start, part[0]) < min(stop, part[1]):
            yield max(start, part[0]), min(stop, part[1])


def _num_rows(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)
