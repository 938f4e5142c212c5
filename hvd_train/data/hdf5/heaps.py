"""Where an HDF5 file has strings of variable length: checked before HDF5 reads them.

A dataset of such strings has references, of 16 bytes each: length, address of a heap, and number of an object
in it. A heap is a row of objects, each with its size. HDF5 goes from one to the next by these sizes, and goes
on without an end where one is 0, as in a part of a file that was overwritten with zeros.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.errors import DataError

_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
_HEAP_HEADER = struct.Struct("<4sB3xQ")
_OBJECT_HEADER = struct.Struct("<HH4xQ")
_DEFLATE, _SHUFFLE = 1, 2
_UNDEFINED = (1 << 64) - 1


def require_sound_heaps(dataset: h5py.Dataset, path: str, where: str) -> None:
    """Raises `DataError` if a heap of `dataset`, strings of variable length in the file `path`, is damaged so
    that HDF5 would not come to its end. References behind filters other than gzip and shuffle are not
    followed."""
    creation = h5py.h5i.get_file_id(dataset.id).get_create_plist()
    if creation.get_sizes() != (8, 8) or not hasattr(dataset.id, "chunk_iter"):
        return
    base = creation.get_userblock()
    with open(path, "rb") as file:
        for block in _references(dataset, file):
            addresses = np.unique(block["address"][block["length"] > 0])
            for address in addresses[addresses != _UNDEFINED].tolist():
                if not _is_sound(file, base + address):
                    raise DataError(
                        f"{where}: the heap of strings at byte {base + address} is damaged. Copy or write "
                        "the file again."
                    )


def _references(dataset: h5py.Dataset, file: BinaryIO) -> Iterator[npt.NDArray[np.void]]:
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if offset is not None:
            file.seek(offset)
            yield _parsed(file.read(dataset.size * _REFERENCE.itemsize))
        return
    pipeline = dataset.id.get_create_plist()
    filters = [pipeline.get_filter(index)[0] for index in range(pipeline.get_nfilters())]
    chunks: list[Any] = []
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        file.seek(chunk.byte_offset)
        raw = _decoded(file.read(chunk.size), filters, chunk.filter_mask, dataset.chunks)
        yield _parsed(raw)


def _decoded(raw: bytes, filters: list[int], skipped: int, shape: tuple[int, ...]) -> bytes:
    """A chunk of references; empty if it cannot be decoded here."""
    num_bytes = int(np.prod(shape)) * _REFERENCE.itemsize
    for index in reversed(range(len(filters))):
        if skipped >> index & 1:
            continue
        if filters[index] == _DEFLATE:
            try:
                raw = zlib.decompressobj().decompress(raw, num_bytes)
            except zlib.error:
                return b""
        elif filters[index] == _SHUFFLE:
            whole = len(raw) // _REFERENCE.itemsize
            columns = np.frombuffer(raw, np.uint8, whole * _REFERENCE.itemsize)
            raw = columns.reshape(_REFERENCE.itemsize, whole).T.tobytes()
        else:
            return b""
    return raw


def _parsed(raw: bytes) -> npt.NDArray[np.void]:
    return np.frombuffer(raw, _REFERENCE, len(raw) // _REFERENCE.itemsize)


def _is_sound(file: BinaryIO, address: int) -> bool:
    """Whether HDF5 comes to the end of a heap."""
    file.seek(address)
    header = file.read(_HEAP_HEADER.size)
    if len(header) < _HEAP_HEADER.size or header[:4] != b"GCOL":
        return True  # which HDF5 says
    heap = file.read(_HEAP_HEADER.unpack(header)[2] - _HEAP_HEADER.size)
    at = 0
    while at + _OBJECT_HEADER.size <= len(heap):
        number, _, size = _OBJECT_HEADER.unpack_from(heap, at)
        at += (_OBJECT_HEADER.size + -(-size // 8) * 8) if number else size
        if (not size and not number) or at > len(heap):
            return False
    return True
