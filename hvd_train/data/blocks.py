"""Blocks of rows: their size in bytes and their checksums."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import xxhash

from hvd_train.data.format import FieldSpec
from hvd_train.data.h5 import Array


def row_bytes(field: FieldSpec) -> int:
    """Bytes of one row."""
    return math.prod(field.shape) * np.dtype(field.dtype).itemsize


def rows_per_block(field: FieldSpec, num_bytes: int) -> int:
    """Rows that fit into `num_bytes`; at least 1."""
    return max(1, num_bytes // max(1, row_bytes(field)))


def checksum(rows: Array) -> int:
    """xxh3_64 of the values in row-major order, little-endian: the same on every machine."""
    little = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    return xxhash.xxh3_64_intdigest(little.reshape(-1).view(np.uint8).data)


def checksums(array: Array, block_rows: int) -> npt.NDArray[np.uint64]:
    """The checksum of each block of `block_rows` rows; the last block may be shorter."""
    sums = [checksum(array[start : start + block_rows]) for start in range(0, len(array), block_rows)]
    return np.array(sums, np.uint64)
