"""How many bytes of a file a dataset takes: HDF5 trusts what the file says of it."""

from __future__ import annotations

import itertools
import math
import operator
import os
from typing import Any

import h5py

from hvd_train.data.hdf5.chunk_index import largest_number
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import listed

_FLETCHER32 = 3
_CHECKSUM_BYTES = 4
_LARGER = 2
_MORE_BYTES = 64 << 10
"""No filter makes a chunk larger than this many times, and this many bytes more."""

_MOST_MORE = 16
_MOST_FREE = 10_000_000
_ENTRY_BYTES = 8
"""Of a chunk in an index, at least."""

_OTHER_SIZES = (h5py.h5t.STRING, h5py.h5t.VLEN, h5py.h5t.REFERENCE)
"""Types with another size in a file than in memory."""

_DAMAGED = "The file is damaged: copy or write it again."
_REMEDY = ". The file is damaged, or was made to exhaust the memory: copy or write it again."

_COMPRESSIONS = {
    1: "gzip",
    4: "szip",
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32015: "zstd",
}
"""Filters that may unpack a few bytes to any number."""


def require_one_compression(dataset: h5py.Dataset, where: str) -> None:
    """Raises `UnsupportedShard` if chunks are compressed twice: a file of some KiB may then unpack to any
    size, and nothing in it tells."""
    pipeline = dataset.id.get_create_plist()
    numbers = [pipeline.get_filter(index)[0] for index in range(pipeline.get_nfilters())]
    names = [_COMPRESSIONS[number] for number in numbers if number in _COMPRESSIONS]
    if len(names) > 1:
        raise UnsupportedShard(
            f"{where} is compressed {len(names)} times: {listed(names)}. Expected one compression, as a "
            "small file could unpack to any size. If you trust the file, write it again: `h5repack -f GZIP=4 "
            "OLD.h5 NEW.h5`."
        )


def require_plausible_storage(dataset: h5py.Dataset, axis: int, path: str, where: str) -> None:
    """Raises `DataError` for values that are stored in another number of bytes than they have, for a chunk
    that is outside of the dataset, is stored in far more bytes than its values have, or in fewer than its
    checksum, and for more chunks than the dataset can have: HDF5 would read other values, exhaust the memory,
    fail, or go on without an end. Goes through the index of all chunks.

    Args:
        axis: of the samples.
        path: of the file.
    """
    pipeline, shape = dataset.id.get_create_plist(), dataset.shape
    if pipeline.get_layout() == h5py.h5d.CONTIGUOUS:
        _require_all_bytes(dataset, where)
    if dataset.chunks is None or not hasattr(dataset.id, "chunk_iter"):
        return
    num_chunks = math.prod(-(-n // c) for n, c in zip(shape, dataset.chunks, strict=True))
    # Numbers of chunks that are there no longer, or not yet, cost little.
    most_numbers = _MOST_MORE * num_chunks + _MOST_FREE + os.path.getsize(path) // _ENTRY_BYTES
    if largest_number(dataset, path) > most_numbers:
        raise DataError(f"{where}{_too_many(shape)}{_REMEDY}")
    filters = [pipeline.get_filter(index)[0] for index in range(pipeline.get_nfilters())]
    num_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    most = _LARGER * num_bytes + _MORE_BYTES
    checked = sum(1 << index for index, number in enumerate(filters) if number == _FLETCHER32)

    numbers = itertools.count(1)

    def wrong(chunk: Any) -> str | None:
        if next(numbers) > num_chunks:
            return _too_many(shape)
        if any(map(operator.ge, chunk.chunk_offset, shape)):
            return f": a chunk begins at {list(chunk.chunk_offset)}, outside of its shape {list(shape)}"
        least = _CHECKSUM_BYTES + 1 if checked & ~chunk.filter_mask else 1
        if least <= chunk.size <= most:
            return None  # goes on to the next chunk
        start = chunk.chunk_offset[axis]
        stop = min(start + dataset.chunks[axis], shape[axis])
        return (
            f", rows {start} to {stop - 1}: a chunk is stored in {chunk.size:,} bytes, but has {num_bytes:,} "
            "bytes of values"
        )

    found = dataset.id.chunk_iter(wrong)
    if found is not None:
        raise DataError(f"{where}{found}{_REMEDY}")


def _require_all_bytes(dataset: h5py.Dataset, where: str) -> None:
    # HDF5 would read some values from other places, according to how many are read at a time.
    kind = dataset.id.get_type()
    if any(map(kind.detect_class, _OTHER_SIZES)):
        return
    stored, expected = dataset.id.get_storage_size(), dataset.size * kind.get_size()
    if dataset.id.get_offset() is not None and stored != expected:
        raise DataError(
            f"{where}: its values are stored in {stored:,} bytes, but have {expected:,}. {_DAMAGED}"
        )


def _too_many(shape: tuple[int, ...]) -> str:
    return f": its index has more chunks than its shape {list(shape)} can have"
