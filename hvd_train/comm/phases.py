"""An average in phases: shares, reduce-scatter, slice step, all-gather. For backends that move messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hvd_train.comm.base import Communicator, OnSlice
from hvd_train.comm.buffer import DTYPES, Buffer
from hvd_train.errors import SizeMismatch


class Mover(Protocol):
    """Moves slices between the ranks; each method is collective."""

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        """owned := this rank's slice of the sum of all ranks' `staged`."""

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        """staged := the slices of all ranks, in rank order."""


def average_in_phases(
    comm: Communicator, mover: Mover, buffer: Buffer, weight: float, on_slice: OnSlice | None
) -> bool:
    """`Communicator.average` over a `Mover`. Collective."""
    shares = agree_on_shares(comm, buffer, weight)
    if shares is None:
        buffer.live.copy_(buffer.anchor)
        return False
    staged = buffer.stage(shares[comm.rank])
    mover.reduce_scatter(staged, buffer.owned)
    if on_slice is not None:
        on_slice(buffer.owned, buffer.start)
    mover.all_gather(buffer.owned, staged)
    buffer.complete()
    return True


def agree_on_shares(comm: Communicator, buffer: Buffer, weight: float) -> list[float] | None:
    """Each rank's weight over the sum of all, by rank; None if that sum is 0. Collective.

    Every rank sees every rank's call: all raise the same error, or none. It also holds a rank back from
    overwriting the older slot until all have completed the newer one, as no rank gets here before.
    """
    return shares_of(comm.gather_values(row_of(buffer, weight)).tolist())


def row_of(buffer: Buffer, weight: float) -> list[float]:
    """What a rank reports to the others before an average."""
    return [float(weight), float(buffer.numel), float(DTYPES.index(buffer.dtype))]


def shares_of(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """What `agree_on_shares` returns or raises, of the rows of all ranks. Not collective."""
    # Without numpy: the caches are full of parameters, and each of its calls would come from memory.
    weights = [row[0] for row in rows]
    agree_on_layout([(row[1], row[2]) for row in rows])
    for rank, given in enumerate(weights):
        if not 0 <= given < math.inf:
            raise SizeMismatch(
                f"average: rank {rank} gave the weight {given}; expected a number of at least 0."
            )
    total = math.fsum(weights)
    return [given / total for given in weights] if total > 0 else None


def agree_on_layout(layouts: Sequence[tuple[float, float]]) -> None:
    """Raises `SizeMismatch` unless all ranks have a buffer of the same number of elements and type code. Not
    collective: all ranks know the layouts of all."""
    for what, seen in zip(("elements", "type code"), zip(*layouts, strict=True), strict=True):
        odd = [r for r, value in enumerate(seen) if value != seen[0]]
        if odd:
            raise SizeMismatch(
                f"average: rank 0 gave a buffer with {what} {int(seen[0])}, rank {odd[0]} one with "
                f"{int(seen[odd[0]])}; every rank must give the same layout."
            )
