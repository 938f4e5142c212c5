"""idx files (MNIST's format), plain or gzip."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hvd_train.data.files import require_regular
from hvd_train.data.format import Array
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.sources.base import INPUTS, TARGETS, Arrays, alike
from hvd_train.data.sources.streamed import StreamedArray
from hvd_train.errors import DataError

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_COUNTED_BYTES = 1 << 20


def open_idx_pair(inputs: str, targets: str, progress: Progress = unseen) -> Arrays:
    """Inputs and targets from a file each. Raises `DataError`."""
    first, second = open_idx(inputs, progress), open_idx(targets, progress)
    name = f"{inputs} and {targets}"
    if len(first) != len(second) or not len(first):
        raise DataError(alike(name, {INPUTS: len(first), TARGETS: len(second)}))
    # Labels are small; as int64 they need no conversion in any loss.
    labels = {TARGETS: "int64"} if second.dtype.kind in "iu" and len(second.shape) == 1 else {}
    scale = 1 / 255 if first.dtype == np.uint8 and len(first.shape) >= 3 else None
    return Arrays(first, second, scale, name=name, files=(inputs, targets), dtypes=labels)


def read_idx(path: str | Path) -> Array:
    """The array of an idx file, plain or gzip, in native byte order, in memory. Errors: see `open_idx`."""
    array = open_idx(path)
    return np.asarray(array[:], array.dtype.newbyteorder("="))


def open_idx(path: str | Path, progress: Progress = unseen) -> Array:
    """The array of an idx file, [rows, ...] in the file's byte order: mapped, or of a gzip file a
    `StreamedArray`. All of a gzip file is read once.

    Raises `DataError` for a wrong magic number and for too few or too many bytes.
    """
    path = Path(path)
    with _explained(path):
        require_regular(path, "an idx file, plain or .gz")
        with path.open("rb") as file:
            # By content, not by name: browsers unpack .gz files and keep the name.
            packed = file.read(2) == _GZIP_MAGIC
        num_bytes = _unpacked_bytes(path, progress) if packed else os.path.getsize(path)
        with _opened(path, packed) as file:
            dtype, shape, header = _header(path, file)
        num_bytes -= header
        expected = dtype.itemsize
        for length in shape:
            expected *= length
        if num_bytes != expected:
            kind = "truncated" if num_bytes < expected else "too long"
            raise DataError(
                f"{path}: {kind}: {num_bytes} bytes of values, but {expected} for the shape "
                f"{list(shape)} that its header gives. Copy the file again."
            )
        if packed:
            return StreamedArray(lambda: _at_values(path, header), shape, dtype)  # type: ignore[return-value]
        return np.memmap(path, dtype, "r", header, shape) if expected else np.empty(shape, dtype)


def _header(path: Path, file: BinaryIO) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    raw = file.read(4)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise DataError(
            f"{path}: begins with {raw.hex(' ') or 'nothing'}. Expected an idx file: two zero bytes, "
            "a type (08, 09, 0b to 0e) and the number of dimensions. Is this the right file?"
        )
    dtype, num_dims = np.dtype(_IDX_DTYPES[raw[2]]), raw[3]
    lengths = file.read(4 * num_dims)
    header = 4 + 4 * num_dims
    if num_dims == 0 or len(lengths) < 4 * num_dims:
        raise DataError(
            f"{path}: {4 + len(lengths)} bytes and {num_dims} dimensions. Expected a whole idx header: copy "
            "it again."
        )
    return dtype, struct.unpack(f">{num_dims}I", lengths), header


def _opened(path: Path, packed: bool) -> BinaryIO:
    return gzip.open(path) if packed else open(path, "rb")  # type: ignore[return-value]


def _at_values(path: Path, header: int) -> BinaryIO:
    file = _opened(path, packed=True)
    file.read(header)
    return file


def _unpacked_bytes(path: Path, progress: Progress) -> int:
    num_bytes = 0
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as file:
        while piece := file.read(_COUNTED_BYTES):
            num_bytes += len(piece)
            progress(Step("read to check the size", raw.tell(), os.path.getsize(path), "bytes"))
    return num_bytes


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected an idx file, plain or .gz.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Copy the file again.") from None
