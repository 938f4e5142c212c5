"""Blocks of rows: their size in bytes, their checksums, the classes in them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import xxhash

from hvd_train.data.format import Array, FieldSpec


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


def class_counts(targets: Array, num_classes: int) -> npt.NDArray[np.int64]:
    """Values of each class from 0 to `num_classes` - 1, [num_classes].

    Others count for none: those below 0 are how losses mark what is to be ignored.
    """
    values = targets.reshape(-1)
    values = values[(values >= 0) & (values < num_classes)]
    return np.bincount(values.astype(np.intp), minlength=num_classes).astype(np.int64)
