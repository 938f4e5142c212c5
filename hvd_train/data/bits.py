"""One bit for each of many rows, in an eighth of a byte a row."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]

_PIECE = 1 << 20
"""Bits that are unpacked at a time; a multiple of 8."""


@final
class Bits:
    """`size` bits, of which none is set at first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.packed: npt.NDArray[np.uint8] = np.zeros(-(-size // 8), np.uint8)

    def pieces(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """The bits from `start` up to `stop`, cut into ranges that may be unpacked at a time."""
        stop = self.size if stop is None else stop
        return [(first, min(first + _PIECE, stop)) for first in range(start, stop, _PIECE)]

    def read(self, start: int, stop: int) -> Flags:
        """The bits `start` up to `stop`."""
        byte = start // 8
        flags = np.unpackbits(self.packed[byte : -(-stop // 8)])
        return flags[start - 8 * byte : stop - 8 * byte].view(np.bool_)

    def write(self, start: int, flags: Flags) -> None:
        """Sets the bits from `start` on to `flags`."""
        byte, stop = start // 8, start + len(flags)
        around = np.unpackbits(self.packed[byte : -(-stop // 8)])
        around[start - 8 * byte : stop - 8 * byte] = flags
        self.packed[byte : -(-stop // 8)] = np.packbits(around)

    def set(self, numbers: npt.NDArray[np.int64]) -> None:
        """Sets the bits of these numbers, each of which is there once."""
        ordered = np.sort(numbers)
        for first, last in self.pieces():
            inside = ordered[slice(*np.searchsorted(ordered, (first, last)))]
            if len(inside):
                flags = self.read(first, last)
                flags[inside - first] = True
                self.write(first, flags)

    def counts(self, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many are set before each of the ascending `bounds`."""
        before = np.zeros(len(bounds), np.int64)
        total = 0
        for first, last in self.pieces():
            inside = slice(*np.searchsorted(bounds, (first, last)))
            sums = np.concatenate([[0], np.cumsum(self.read(first, last))])
            before[inside] = total + sums[bounds[inside] - first]
            total += int(sums[-1])
        before[np.searchsorted(bounds, self.size) :] = total
        return before

    def count(self) -> int:
        """How many are set."""
        return sum(int(np.count_nonzero(self.read(*piece))) for piece in self.pieces())

    def after(self, count: int) -> int:
        """The number of the first bits of which `count` are set, the fewest; 0 if `count` is."""
        for first, last in self.pieces() if count else ():
            set_ = np.flatnonzero(self.read(first, last))
            if count <= len(set_):
                return first + int(set_[count - 1]) + 1
            count -= len(set_)
        return 0
