"""Where an undamaged HDF5 file has what: its metadata, and the structures of it that carry a checksum."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py

from hvd_train.data import format as fmt

_SIGNATURES = (b"OCHK", b"BTHD", b"BTLF", b"BTIN", b"FRHP", b"FHIB", b"FAHD", b"FADB", b"EAHD", b"EAIB")
_MOST_BYTES = 800
"""Of a structure whose end is searched by its checksum."""


@dataclass(frozen=True)
class Structure:
    """A part of an HDF5 file, the checksum of which is in the four bytes from `stop` on."""

    start: int
    stop: int

    def correct(self, raw: bytearray) -> None:
        """Makes the checksum fit."""
        if self.stop + 4 <= len(raw):
            struct.pack_into("<I", raw, self.stop, lookup3(bytes(raw[self.start : self.stop])))


def structures_of(raw: bytes) -> list[Structure]:
    """The superblock, object headers, B-trees, heaps and chunk indices, if they have checksums."""
    return sorted(_find(raw), key=lambda found: found.start)


def metadata_of(path: Path) -> list[int]:
    """The offsets of bytes that are no values of datasets, most of those that are 0 left out."""
    raw = path.read_bytes()
    taken = bytearray(len(raw))
    for start, size in _values(path):
        taken[start : start + size] = b"\1" * size
    near = [any(raw[max(0, at - 3) : at + 4]) for at in range(len(raw))]
    return [at for at in range(len(raw)) if not taken[at] and near[at]]


def _values(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of the values of each dataset, or of each of its chunks."""
    found: list[tuple[int, int]] = []

    def add(name: str, node: h5py.HLObject) -> None:
        if not isinstance(node, h5py.Dataset) or name.startswith(fmt.GROUP):
            return
        if node.chunks:
            node.id.chunk_iter(lambda chunk: found.append((chunk.byte_offset, chunk.size)))
        elif node.id.get_offset() is not None:
            found.append((node.id.get_offset(), node.id.get_storage_size()))

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(add)
    return iter(found)


def _find(raw: bytes) -> Iterator[Structure]:
    if raw[8] >= 2:
        yield Structure(0, 44)
    for start in _all(raw, b"OHDR"):
        flags = raw[start + 5]
        size_at = start + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        size_bytes = 1 << (flags & 3)
        size = int.from_bytes(raw[size_at : size_at + size_bytes], "little")
        yield Structure(start, size_at + size_bytes + size)
    for signature in _SIGNATURES:
        for start in _all(raw, signature):
            yield from _ended(raw, start)


def _ended(raw: bytes, start: int) -> Iterator[Structure]:
    for stop in range(start + 10, min(start + _MOST_BYTES, len(raw) - 4)):
        if raw[stop : stop + 4] == struct.pack("<I", lookup3(raw[start:stop])):
            yield Structure(start, stop)
            return


def _all(raw: bytes, signature: bytes) -> Iterator[int]:
    start = raw.find(signature)
    while start >= 0:
        yield start
        start = raw.find(signature, start + 1)


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata: `hashlittle` of Bob Jenkins' lookup3.c, with seed 0."""
    mask = 0xFFFFFFFF

    def rotated(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    while len(data) > 12:
        x, y, z = struct.unpack_from("<III", data)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for k in (4, 6, 8, 16, 19, 4):
            # (a, b, c) takes the next role in turn: a -= c; a ^= rot(c, k); c += b
            a = ((a - c) & mask) ^ rotated(c, k)
            c = (c + b) & mask
            a, b, c = b, c, a
        data = data[12:]
    if not data:
        return c
    x, y, z = struct.unpack("<III", data.ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for k in (14, 11, 25, 16, 4, 14, 24):
        # c ^= b; c -= rot(b, k), likewise
        c = ((c ^ b) - rotated(b, k)) & mask
        a, b, c = b, c, a
    return b
