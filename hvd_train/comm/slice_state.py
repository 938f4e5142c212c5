"""What a slice step keeps from one average to the next, such as the momentum of an outer optimizer."""

from __future__ import annotations

from dataclasses import dataclass

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

    @classmethod
    def private(cls, num_values: int, dtype: torch.dtype, owned: tuple[int, int]) -> SliceState:
        """In the memory of this process alone, zeros."""
        start, stop = owned
        first, second = (torch.zeros(num_values, stop - start, dtype=dtype) for _ in range(2))
        return cls((first, second), start, owned)

    def own(self, slot: int) -> Tensor:
        """The values of the elements that this rank owns: [values per element, owned elements], a view."""
        start, stop = self.owned
        return self.slots[slot][:, start - self.first : stop - self.first]

    @property
    def num_bytes(self) -> int:
        """Bytes of both slots that are this rank's."""
        return 2 * self.own(0).numel() * self.own(0).itemsize
