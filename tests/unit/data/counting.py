"""Counts what HDF5 does: the chunks that it decodes, and the reads of a file."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

_FILTER = 300  # of those that HDF5 leaves for tests
_DECODING = 0x0100  # H5Z_FLAG_REVERSE

_Filter = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_void_p),
)


class _Class(ctypes.Structure):
    """H5Z_class2_t."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_int),
        ("encoder_present", ctypes.c_uint),
        ("decoder_present", ctypes.c_uint),
        ("name", ctypes.c_char_p),
        ("can_apply", ctypes.c_void_p),
        ("set_local", ctypes.c_void_p),
        ("filter", _Filter),
    )


class CountingFilter:
    """An HDF5 filter that leaves the values as they are, and counts the chunks that are decoded."""

    def __init__(self) -> None:
        self.decoded = 0
        self._class = _Class(1, _FILTER, 1, 1, b"counting", None, None, _Filter(self._pass))
        # The library that h5py has loaded, whatever its name.
        maps = Path("/proc/self/maps").read_text().splitlines()
        path = next(line.split()[-1] for line in maps if "libhdf5" in line and "_hl" not in line)
        self._library = ctypes.CDLL(path)
        assert self._library.H5Zregister(ctypes.byref(self._class)) >= 0

    def _pass(self, flags: int, _n: int, _values: Any, num_bytes: int, _size: Any, _buffer: Any) -> int:
        self.decoded += bool(flags & _DECODING)
        return num_bytes

    def create(self, file: h5py.File, name: str, values: Any, chunks: tuple[int, ...]) -> None:
        """A dataset whose chunks pass through the filter."""
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk(chunks)
        layout.set_filter(_FILTER, 0, ())
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, name.encode(), kind, space, layout).write(h5py.h5s.ALL, h5py.h5s.ALL, values)

    def close(self) -> None:
        """Takes the filter out of the library again."""
        assert self._library.H5Zunregister(_FILTER) >= 0


class CountingFile(io.FileIO):
    """A file that counts how it is read."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path))
        self.sizes: list[int] = []

    def readinto(self, buffer: Any) -> int:
        read = super().readinto(buffer)
        self.sizes.append(read or 0)
        return read or 0


def opening(files: list[CountingFile]) -> Callable[[str | Path], h5py.File]:
    """In place of `opening.open_file`: opens `CountingFile`s and adds them to `files`."""

    def open_file(path: str | Path) -> h5py.File:
        files.append(CountingFile(path))
        return h5py.File(files[-1], "r")

    return open_file
