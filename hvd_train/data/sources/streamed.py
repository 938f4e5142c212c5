"""Arrays in files that can only be read from the beginning: compressed ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, BinaryIO, final

import numpy as np

from hvd_train.data.format import Array

_SKIPPED_BYTES = 1 << 20


@final
class StreamedArray:
    """A file's array whose rows are read in order; to go back is to begin anew. It has of a numpy array what
    reading blocks of rows needs.

    Args:
        open_values: opens the file where the values begin.
        shape: of the array, in row-major order.
        dtype: of the values in the file.

    Reading raises what the file raises, and EOFError where it ends early.
    """

    def __init__(
        self, open_values: Callable[[], BinaryIO], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._open = open_values
        self.shape = shape
        self.dtype = dtype
        self._row_bytes = dtype.itemsize * math.prod(shape[1:])
        self._file: BinaryIO | None = None
        self._at = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        """Consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        if self._file is None or start < self._at:
            self.close()
            self._file, self._at = self._open(), 0
        _skip(self._file, (start - self._at) * self._row_bytes)
        self._at = stop
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        read_exactly(self._file, values.reshape(-1).view(np.uint8).data)
        return values

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _skip(file: BinaryIO, num_bytes: int) -> None:
    buffer = bytearray(min(num_bytes, _SKIPPED_BYTES))
    while num_bytes:
        piece = memoryview(buffer)[:num_bytes]
        read_exactly(file, piece)
        num_bytes -= len(piece)


def read_exactly(file: BinaryIO, out: memoryview) -> None:
    """Fills `out`. Raises EOFError where the file ends before."""
    while len(out):
        count = file.readinto(out)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the values end early")
        out = out[count:]
