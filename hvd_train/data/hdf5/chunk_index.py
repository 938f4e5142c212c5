"""How many chunks the index of a dataset says to have.

In its newer formats HDF5 has the chunks in a fixed or an extensible array, and goes through all numbers up to
the largest one that the header of the array records. That header is read here, from the file: h5py does not
tell it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import h5py

_LAYOUT, _CONTINUATION = 8, 16
_CHUNKED = 2
_ARRAYS = {3: (b"FAHD", 1, 8), 4: (b"EAHD", 5, 44)}
"""By the kind of index, fixed and extensible array: the signature of the header, how many bytes are between
the kind and the address of the header, and where the header has the number."""
_MOST_BLOCKS = 100
_MOST_BLOCK_BYTES = 1 << 24


def largest_number(dataset: h5py.Dataset, path: str) -> int:
    """The chunks of an array have numbers below this one; 0 for datasets with another index. `path`: of the
    file."""
    creation = h5py.h5i.get_file_id(dataset.id).get_create_plist()
    if creation.get_sizes() != (8, 8):
        return 0
    base = creation.get_userblock()
    with open(path, "rb") as file:
        for kind, content in _messages(file, base, _address(dataset)):
            if kind == _LAYOUT and len(content) > 5 and content[0] >= 4 and content[1] == _CHUNKED:
                # Flags, number of axes, bytes of a length, lengths of a chunk, kind of index, ..., address.
                return _recorded(file, base, content[5 + content[3] * content[4] :])
    return 0


def _address(dataset: h5py.Dataset) -> int:
    # Not by H5Oget_info, which goes through the index to measure it.
    return int(dataset.file.id.links.get_info(h5py.h5i.get_name(dataset.id)).u)


def _recorded(file: BinaryIO, base: int, index: bytes) -> int:
    """By the header of the array; `index`: what the object header says of the index, from its kind on."""
    if not index or index[0] not in _ARRAYS:
        return 0
    signature, skipped, at = _ARRAYS[index[0]]
    address = int.from_bytes(index[1 + skipped : 9 + skipped], "little")
    header = _read(file, base + address, at + 8)
    return int.from_bytes(header[at:], "little") if header.startswith(signature) else 0


def _messages(file: BinaryIO, base: int, address: int) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each message of an object header."""
    start = _read(file, base + address, 16)
    is_new = start[:4] == b"OHDR"
    if is_new:
        flags = start[5]
        at = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        size = int.from_bytes(_read(file, base + address + at, width), "little")
        blocks = [(address + at + width, size)]
        form = "<BHB2x" if flags & 4 else "<BHB"
    else:
        blocks = [(address + 16, int.from_bytes(start[8:12], "little"))]
        form = "<HHB3x"
    for number in range(_MOST_BLOCKS):
        if number == len(blocks):
            return
        begin, size = blocks[number]
        raw = _read(file, base + begin, min(size, _MOST_BLOCK_BYTES))
        at = 4 if is_new and number else 0  # the signature of a continuation
        while at + struct.calcsize(form) <= len(raw):
            kind, size, _ = struct.unpack_from(form, raw, at)
            at += struct.calcsize(form)
            content = raw[at : at + size]
            at += size
            if kind == _CONTINUATION and len(content) >= 16:
                blocks.append(struct.unpack_from("<QQ", content))
            yield kind, content


def _read(file: BinaryIO, address: int, size: int) -> bytes:
    if address >= 1 << 63:
        return b""
    file.seek(address)
    return file.read(size)
