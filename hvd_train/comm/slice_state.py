"""What a slice step keeps from one average to the next, such as the momentum of an outer optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class SliceState:
    """A few values for each element of a buffer, in two slots that change roles together with those of the
    anchor: a slice step reads the values of the last average in one and writes those of the next to the
    other, so that an average that fails changes nothing.

    Where ranks share memory the slots are theirs together and each rank writes the elements that it owns:
    those of a rank that died can still be read.
    """

    slots: tuple[Tensor, Tensor]
    """Each [values per element, elements], float32, or float64 for a float64 buffer."""
    first: int
    """Which element of the buffer their first one is."""
    owned: tuple[int, int]
    """[start, stop) of the elements that this rank owns, counted from the start of the buffer."""
    readable: tuple[int, int]
    """The same of those whose values this rank can read: its own, and where ranks share memory those of all
    ranks of its host."""
    lost: int = 0
    """Elements of the whole buffer whose values no rank could read when it was recovered: zeros then."""

    @classmethod
    def private(cls, num_values: int, dtype: torch.dtype, owned: tuple[int, int]) -> SliceState:
        """In the memory of this process alone, zeros."""
        start, stop = owned
        first, second = (torch.zeros(num_values, stop - start, dtype=dtype) for _ in range(2))
        return cls((first, second), start, owned, owned)

    @property
    def num_values(self) -> int:
        """Values per element."""
        return len(self.slots[0])

    def values(self, slot: int, start: int, stop: int) -> Tensor:
        """Those of the elements [start, stop), which must be readable: [values per element, elements], a
        view."""
        return self.slots[slot][:, start - self.first : stop - self.first]

    def own(self, slot: int) -> Tensor:
        """The values of the elements that this rank owns: [values per element, owned elements], a view."""
        return self.values(slot, *self.owned)

    @property
    def num_bytes(self) -> int:
        """Bytes of both slots that are this rank's."""
        return 2 * self.own(0).numel() * self.own(0).itemsize


class Piece(NamedTuple):
    """Elements [start, stop) of a buffer whose kept values go from one rank to another."""

    start: int
    stop: int
    reader: int | None
    """The rank that has them: the owner itself, if it can read them; else the lowest; None: no rank has."""
    owner: int


def deal(readable: Sequence[tuple[int, int]], owned: Sequence[tuple[int, int]], most: int) -> Iterator[Piece]:
    """Where the values of all elements are, and where they go.

    Args:
        readable: for each rank the elements whose values it can read.
        owned: for each rank those that it is to have; together all, each once.
        most: elements of a piece.
    """
    bounds = {bound for span in readable for bound in span}
    for owner, (first, last) in enumerate(owned):
        inside = bounds | set(range(first, last, most))
        cuts = sorted({first, last} | {bound for bound in inside if first < bound < last})
        for start, stop in pairwise(cuts):
            have = [r for r, (a, b) in enumerate(readable) if a <= start and stop <= b]
            lowest = have[0] if have else None
            yield Piece(start, stop, owner if owner in have else lowest, owner)
