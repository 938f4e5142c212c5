"""Regular selections of a dataset, as the mappings of virtual datasets have them. Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Axis:
    """What is selected of one axis: blocks of `block` positions from `start` on, each `stride` after the one
    before, `size` positions in all. `size` None: as many as there are."""

    start: int
    stride: int
    block: int
    size: int | None

    @property
    def is_contiguous(self) -> bool:
        """Whether nothing is left out between the first and the last."""
        return self.stride == self.block or (self.size is not None and self.size <= self.block)

    def below(self, position: int) -> int:
        """How many are selected before `position`."""
        if position <= self.start:
            return 0
        blocks, rest = divmod(position - self.start, self.stride)
        found = blocks * self.block + min(rest, self.block)
        return found if self.size is None else min(found, self.size)

    def at(self, number: int) -> int:
        """The position of the selected one of this number, from 0 on."""
        blocks, rest = divmod(number, self.block)
        return self.start + blocks * self.stride + rest

    def stop(self, size: int) -> int:
        """The position after the last one of `size`."""
        return self.at(size - 1) + 1 if size else 0

    def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        """The positions of numbers `first` up to `last`, as ranges."""
        if self.is_contiguous:
            return [(self.start + first, self.start + last)]
        cuts = range(first // self.block, -(-last // self.block))
        bounds = [(max(first, n * self.block), min(last, (n + 1) * self.block)) for n in cuts]
        return [(self.at(begin), self.at(begin) + end - begin) for begin, end in bounds]

    def part(self, first: int, last: int, offset: int = 0) -> slice | npt.NDArray[np.int64]:
        """Numbers `first` up to `last` as an index of an array that begins at position `offset`."""
        if self.is_contiguous:
            return slice(self.start + first - offset, self.start + last - offset)
        numbers = np.arange(first, last)
        return self.start - offset + numbers // self.block * self.stride + numbers % self.block


Selection = tuple[Axis, ...]
"""Along every axis of a dataset."""


@dataclass(frozen=True)
class Stretch:
    """Rows of one dataset that are rows of a field."""

    dataset: tuple[int, int, int]
    """What identifies it, whatever its names: device, inode, address in the file."""

    rows: Axis

    where: str
    """Its file and name."""

    def intervals(self) -> npt.NDArray[np.int64]:
        """[intervals, 2]: the first row of each and the one after its last, in order."""
        return np.array(self.rows.ranges(0, self.rows.size or 0), np.int64).reshape(-1, 2)


def whole(shape: tuple[int, ...]) -> Selection:
    """All of a dataset."""
    return tuple(Axis(0, 1, 1, length) for length in shape)


def selection_of(space: Any) -> Selection | None:
    """What a dataspace (h5py's SpaceID) selects; None for what is no regular selection. All of an extent that
    is not known is an empty selection."""
    kind = space.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        return whole(tuple(map(int, space.shape)))
    if kind != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    return tuple(_axis(*map(int, axis)) for axis in zip(*space.get_regular_hyperslab(), strict=True))


def _axis(start: int, stride: int, count: int, block: int) -> Axis:
    endless = int(h5py.h5s.UNLIMITED)
    if block == endless:
        return Axis(start, 1, 1, None)
    if count == endless:
        return Axis(start, stride, block, None)
    # Of a single block HDF5 has any stride.
    return Axis(start, stride if count > 1 else block, block, count * block)


def inner_size(selection: Selection) -> int:
    """Values of each position of the first axis."""
    return prod(axis.size or 0 for axis in selection[1:])


def index_of(parts: list[slice | npt.NDArray[np.int64]]) -> tuple[Any, ...]:
    """An index of all axes of an array at once, as each of its axes is indexed alone."""
    if all(isinstance(part, slice) for part in parts):
        return tuple(parts)
    return np.ix_(*(np.arange(part.start, part.stop) if isinstance(part, slice) else part for part in parts))
