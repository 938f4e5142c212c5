"""The global heaps of an HDF5 file, which hold rows of variable length.

A heap is a header of 16 bytes, with its size, and objects one after the other, each behind a header of 16
bytes with its number and size; sizes are rounded up to 8 bytes. See "Disk Format: Level 1E - Global Heap" in
the HDF5 File Format Specification.

Reading them here, and not by HDF5, is for two reasons. HDF5 allocates and clears memory for a row by the
length that is recorded for it before it goes to the heap: four damaged bytes take all memory. And h5py 3.16
returns big-endian values of variable-length rows in the wrong byte order.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import final

import h5py

_HEADER = 16
_OBJECT = struct.Struct("<HHIQ")
"""Number, count of references, nothing, bytes."""

_SIGNATURE = b"GCOL\1"

_HELD_BYTES = 16 << 20
"""Of heaps in memory; one at least. Rows may be written in any order."""


@final
@dataclass(frozen=True)
class _Heap:
    content: memoryview

    objects: dict[int, tuple[int, int]]
    """By number, where the bytes of each begin and how many there are."""


@final
class Heaps:
    """Those of one open file, each read when it is first asked for.

    Raises `ValueError` for what is no heap, and objects that are not there.
    """

    def __init__(self, file: h5py.h5f.FileID, file_bytes: int) -> None:
        creation = file.get_create_plist()
        self._handle = file.get_vfd_handle()
        self._base = creation.get_userblock()
        self._size_bytes = creation.get_sizes()[1]
        self._file_bytes = file_bytes
        self._held: OrderedDict[int, _Heap] = OrderedDict()
        self._held_bytes = 0

    def object(self, address: int, number: int) -> memoryview:
        """The bytes of an object of the heap at `address`."""
        heap = self._held.get(address)
        if heap is None:
            heap = self._held[address] = self._read(address)
            self._held_bytes += len(heap.content)
            while len(self._held) > 1 and self._held_bytes > _HELD_BYTES:
                self._held_bytes -= len(self._held.popitem(last=False)[1].content)
        if number not in heap.objects:
            raise ValueError(f"the heap at {address} has no object {number}")
        begin, size = heap.objects[number]
        return heap.content[begin : begin + size]

    def _read(self, address: int) -> _Heap:
        begin = self._base + address
        head = os.pread(self._handle, _HEADER, begin) if 0 < begin < self._file_bytes else b""
        size = int.from_bytes(head[8 : 8 + self._size_bytes], "little")
        if not head.startswith(_SIGNATURE) or not _HEADER <= size <= self._file_bytes - begin:
            raise ValueError(f"there is no heap at {address}")
        content = memoryview(os.pread(self._handle, size, begin))
        objects: dict[int, tuple[int, int]] = {}
        at, wide = _HEADER, (1 << 8 * self._size_bytes) - 1
        while at + _HEADER <= len(content):
            number, _, _, size = _OBJECT.unpack_from(content, at)
            size &= wide
            at += _HEADER
            if not number or size > len(content) - at:  # the rest is free
                break
            objects[number] = at, size
            at += -(-size // 8) * 8
        return _Heap(content, objects)
