"""An average in phases: shares, reduce-scatter, slice step, all-gather. For backends that move messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from hvd_train.comm.base import DTYPES, Buffer, Communicator, OnSlice
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
    staged = buffer.stage(float(shares[comm.rank]))
    mover.reduce_scatter(staged, buffer.owned)
    if on_slice is not None:
        on_slice(buffer.owned, buffer.start)
    mover.all_gather(buffer.owned, staged)
    buffer.complete()
    return True


def agree_on_shares(comm: Communicator, buffer: Buffer, weight: float) -> np.ndarray | None:
    """Each rank's weight over the sum of all, float64 [size]; None if that sum is 0.

    Every rank sees every rank's call: all raise the same error, or none. It also holds a rank back from
    overwriting the older slot until all have completed the newer one, as nobody gets here before.
    """
    row = (float(weight), float(buffer.numel), float(DTYPES.index(buffer.dtype)))
    weights, numels, codes = comm.gather_values(row).T
    agree_on_layout(list(zip(numels, codes, strict=True)))
    good = np.isfinite(weights) & (weights >= 0)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise SizeMismatch(
            f"average: rank {bad} gave the weight {weights[bad]}; expected a number of at least 0."
        )
    total = float(weights.sum())
    return weights / total if total > 0 else None


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
