"""Random damage of the bytes of an HDF5 file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.faults.hdf5_structures import Structure


@dataclass(frozen=True)
class Target:
    """An undamaged file."""

    raw: bytes

    metadata: Sequence[int]
    """Offsets of bytes that are no values."""

    structures: Sequence[Structure]
    """Those with checksums of HDF5."""


def damage(
    target: Target, rng: random.Random, others: Sequence[bytes], *, corrected: bool
) -> tuple[bytes, str]:
    """Changes a file in one place or in a few; returns it, and what was done.

    Args:
        others: contents of other files, parts of which may be put in.
        corrected: make the checksums of HDF5 fit the damage.
    """
    raw, done = bytearray(target.raw), []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        at = rng.choice(target.metadata) if rng.random() < 0.75 else rng.randrange(len(target.raw))
        change = rng.choice(_CHANGES if rng.random() < (0.95 if corrected else 0.85) else _CUTS)
        change(raw, min(at, max(0, len(raw) - 1)), rng, others)
        done.append(f"{change.__name__[1:]} at {at}")
    for structure in target.structures if corrected else ():
        structure.correct(raw)
    return bytes(raw), ", ".join(done) + (", checksums of HDF5 corrected" if corrected else "")


Others = Sequence[bytes]


def _bit(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    raw[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at : at + 1])


def _bytes(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    stop = min(at + rng.choice((1, 1, 2, 4, 8, 16)), len(raw))
    raw[at:stop] = rng.randbytes(stop - at)


def _run(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    stop = min(at + rng.choice((4, 16, 64, 512, 4096)), len(raw))
    raw[at:stop] = rng.choice((b"\0", b"\xff")) * (stop - at)


def _near(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    """An integer a little larger or smaller, or much."""
    size = rng.choice((1, 2, 4, 8))
    value = int.from_bytes(raw[at : at + size], "little")
    value += rng.choice((1, -1, 2, 256, 1 << (8 * size - 1), 1 << (4 * size)))
    _put(raw, at, size, value)


def _limit(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    """An integer at a limit of its type."""
    size = rng.choice((1, 2, 4, 8, 8))
    value = rng.choice((0, 1, -1, -2, 1 << (8 * size - 1), (1 << (8 * size - 1)) - 1, 0x7FFFFFFF, 1 << 32))
    _put(raw, at, size, value)


def _put(raw: bytearray, at: int, size: int, value: int) -> None:
    if at + size <= len(raw):
        raw[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def _copy(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    stop = min(at + rng.choice((4, 8, 40, 200)), len(raw))
    source = rng.randrange(max(1, len(raw) - (stop - at)))
    raw[at:stop] = raw[source : source + stop - at]


def _swap(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    size = min(rng.choice((1, 8, 20, 100)), len(raw) - at)
    other = rng.randrange(max(1, len(raw) - size))
    if abs(other - at) >= size:
        raw[at : at + size], raw[other : other + size] = raw[other : other + size], raw[at : at + size]


def _splice(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    """The same place of another file, or all that comes after it there."""
    other, size = rng.choice(others), rng.choice((8, 64, 512, 1 << 20))
    raw[at : at + size] = other[at : at + size]


def _truncate(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    del raw[at:]


def _delete(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    del raw[at : at + rng.choice((1, 8, 64))]


def _insert(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    raw[at:at] = rng.randbytes(rng.choice((1, 8, 64)))


def _extend(raw: bytearray, at: int, rng: random.Random, others: Others) -> None:
    size = rng.choice((1, 512, 1 << 16))
    raw += rng.choice((bytes(size), rng.randbytes(size), bytes(raw[-size:])))


Change = Callable[[bytearray, int, random.Random, Others], None]
_CHANGES: list[Change] = [_bit, _bit, _bytes, _run, _near, _limit, _limit, _copy, _swap]
_CUTS: list[Change] = [_splice, _splice, _truncate, _delete, _insert, _extend]
