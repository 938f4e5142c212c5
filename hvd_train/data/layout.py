"""How HDF5 stores the rows of a dataset, and what reading some of them costs. Nothing is read here.

HDF5 cuts a chunked dataset into chunks of one shape. All chunks that share rows are a *band*: to read one
row, every chunk of its band is touched. A filtered (compressed) chunk is always read and decoded as a whole,
an unfiltered one that does not fit into the chunk cache is read in part.

    chunks of (64, 1024) of a dataset [60000, 1024]: a band is 1 chunk of 64 rows
    chunks of (60000, 1):                            a band is 1024 chunks of all rows
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import ceil, prod

from hvd_train.errors import DataError

SMALL_BYTES = 1 << 20
"""Of a dataset whose bands have at most so many bytes, the chunk cache of HDF5 holds one band."""

HELD_BYTES = 64 << 20
"""Decoded rows of one dataset that a process holds, so that reading on does not decode their chunks again."""

_PARTIAL_BYTES = 1 << 20
"""The same where nothing is decoded: enough that reads of a few bytes a chunk are rare."""

_SUGGESTED_BYTES = 512 << 10

_MOST_DECODES = 4
"""In one pass over rows in order, of each chunk."""

Box = tuple[slice, ...]
"""A part of a sample: a slice of each axis of the dataset but the first."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The dataset that rows are a part of: of which columns or a range are read, or the samples are along
    another axis than the first. Chunks are read and decoded as they are there."""

    shape: tuple[int, ...]
    """With the axes of the file."""

    chunk: tuple[int, ...]
    """Shape of a chunk."""

    itemsize: int
    """Bytes of one value, or of one row of a table."""

    axis: int = 0
    """Of the samples."""

    band_chunks: int = 1
    """Chunks of a band of which something is read."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a dataset and of its chunks."""

    shape: tuple[int, ...]
    """Rows first."""

    itemsize: int
    """Bytes of one value as it is read."""

    chunk: tuple[int, ...] | None = None
    """Shape of a chunk; None for a dataset that is not chunked."""

    filtered: bool = False
    """Whether chunks pass through a filter (compression, shuffle, checksum)."""

    whole: Whole | None = None
    """What it is a part of; None if rows are those of the dataset."""

    dataset: str = field(default="", compare=False)
    """Its name in its file, for messages; empty: that of the field."""

    file: str = field(default="", compare=False)
    """The file that it is in, for messages; empty: the shard."""

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, decoded; 0 for a dataset that is not chunked."""
        stored = self.whole or self
        return prod(stored.chunk or ()) * stored.itemsize if self.chunk else 0

    @property
    def band_rows(self) -> int:
        """Rows of a band; 1 for a dataset that is not chunked."""
        return self.chunk[0] if self.chunk else 1

    @cached_property
    def band_chunks(self) -> int:
        """Chunks of a band of which something is read."""
        return self.whole.band_chunks if self.whole else prod(self._tiles())

    @cached_property
    def band_bytes(self) -> int:
        """Bytes of the chunks of a band, decoded; at the edges chunks reach beyond the dataset."""
        return self.band_chunks * self.chunk_bytes

    @cached_property
    def is_large(self) -> bool:
        """Whether reading a few rows touches far more than them, so that neighbouring rows are held."""
        costly = self.filtered or self.band_chunks > 1
        return costly and self.band_rows > 1 and self.band_bytes > SMALL_BYTES

    @property
    def cache_bytes(self) -> int:
        """Chunk cache for the dataset. None for large bands, of which decoded rows are held instead of
        chunks; without a cache HDF5 reads parts of unfiltered chunks."""
        return 0 if self.is_large else SMALL_BYTES

    @cached_property
    def held_rows(self) -> int:
        """Rows of a band that are held at a time, at least 1; 0 if rows need not be held."""
        if not self.is_large:
            return 0
        most = HELD_BYTES if self.filtered else _PARTIAL_BYTES
        return max(1, min(self.band_rows, self.shape[0], most // max(1, self.row_bytes)))

    @property
    def held_bytes(self) -> int:
        """Bytes of the rows that are held."""
        return self.held_rows * self.row_bytes

    @property
    def decodes(self) -> int:
        """How many times each chunk is decoded when all rows are read in order, a few at a time."""
        if not self.is_large or not self.filtered:
            return 1
        return ceil(min(self.band_rows, self.shape[0]) / self.held_rows)

    @property
    def decoding_bytes(self) -> int:
        """Memory that HDF5 takes while it decodes one large chunk: about four times the chunk, as measured
        with gzip. 0 for small chunks."""
        return 4 * self.chunk_bytes if self.filtered and self.chunk_bytes > SMALL_BYTES else 0

    def touched_bytes(self, block_rows: int, num_blocks: int) -> int:
        """Bytes that are read or decoded for `num_blocks` blocks of rows at random places, taken in the order
        of the file; 0 if that is little more than their rows."""
        if not self.is_large or block_rows >= self.unit_rows:
            return 0
        if not self.filtered:
            return min(num_blocks, ceil(self.shape[0] / self.held_rows)) * self.held_bytes
        bands = ceil(self.shape[0] / self.band_rows) if self.decodes == 1 else num_blocks
        return min(num_blocks, bands) * self.band_bytes

    @property
    def unit_rows(self) -> int:
        """Rows of a block that touches little beyond its rows, if it begins at a multiple of them."""
        return self.band_rows if self.filtered else max(1, self.held_rows)

    def boxes(self, num_chunks: int) -> Iterator[Box]:
        """Boxes that together are a sample, each of `num_chunks` whole chunks or fewer; one if the dataset is
        not chunked."""
        if self.chunk is None:
            yield tuple(slice(0, length) for length in self.shape[1:])
            return
        left = num_chunks
        steps: list[int] = []
        for tiles, width in zip(reversed(self._tiles()), reversed(self.chunk[1:]), strict=True):
            steps.insert(0, min(tiles, left) * width)
            left = max(1, left // tiles)
        axes = [
            [slice(start, min(start + step, length)) for start in range(0, length, step)]
            for length, step in zip(self.shape[1:], steps, strict=True)
        ]
        yield from product(*axes)

    def in_words(self) -> str:
        """Its chunks, for messages."""
        chunk = (self.whole or self).chunk or ()
        return f"chunks of {_by(chunk)} ({prod(chunk):,} values, {self.chunk_bytes:,} bytes)"

    def suggested_chunk(self) -> tuple[int, ...]:
        """Whole samples, about 512 KiB, with the axes of the file."""
        stored, axis = self.whole or self, self.whole.axis if self.whole else 0
        before, others = stored.shape[:axis], stored.shape[axis + 1 :]
        rows = max(1, _SUGGESTED_BYTES // max(1, prod((*before, *others)) * stored.itemsize))
        # A power of two, as block sizes are.
        rows = 1 << (rows.bit_length() - 1)
        return (*before, max(1, min(rows, stored.shape[axis])), *others)

    def _tiles(self) -> tuple[int, ...]:
        """Chunks along each axis but the first."""
        if self.chunk is None:
            return (1,)
        return tuple(ceil(n / c) for n, c in zip(self.shape[1:], self.chunk[1:], strict=True))


def _by(chunk: tuple[int, ...]) -> str:
    return "x".join(map(str, chunk))


def repack_line(path: str, name: str, layouts: Mapping[str, Layout]) -> str:
    """The command that writes the file of field `name` with smaller chunks of every dataset that has large
    ones."""
    file = layouts[name].file
    options = [
        f"-l {shlex.quote(f'{layout.dataset or field}:CHUNK={_by(layout.suggested_chunk())}')}"
        for field, layout in layouts.items()
        if layout.is_large and layout.filtered and layout.file == file
    ]
    return f"h5repack {' '.join(dict.fromkeys(options))} {shlex.quote(file or path)} repacked.h5"


def require_few_decodings(path: str, layouts: Mapping[str, Layout]) -> None:
    """Raises `DataError` if reading the rows of the shard `path` in order, a few at a time, would decode a
    chunk many times."""
    for name, layout in layouts.items():
        if layout.decodes > _MOST_DECODES:
            raise DataError(
                f"{path}: dataset `{name}` is compressed in {layout.in_words()}. To read its rows in "
                f"order, each chunk has to be decoded {layout.decodes} times; expected at most "
                f"{_MOST_DECODES}. Write the file in smaller chunks: "
                f"`{repack_line(path, name, layouts)}`."
            )
