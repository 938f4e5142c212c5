"""What is averaged: a flat tensor with two slots for its anchor.

The slots make an average all or nothing: the result is built in the one that is not the anchor, and the
anchor changes only once the result is complete.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_train.comm.slice_state import SliceState

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that can be averaged, in the order of their codes where ranks compare them."""


def require_averageable(dtype: torch.dtype) -> None:
    """Raises `TypeError` for a type that is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise TypeError(
            f"a buffer of {dtype} cannot be averaged; expected one of {', '.join(map(str, DTYPES))}"
        )


def slice_bounds(numel: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop) of the slice that `rank` owns of `numel` elements. The first `numel % size` slices
    hold one element more; with fewer elements than ranks the last slices are empty."""
    base, extra = divmod(numel, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


class Buffer:
    """A flat CPU tensor of this rank that can be averaged, with two slots for its anchor.

    `live` is where the rank trains: shape [numel], written by any code. `anchor` is the newest complete
    average x_t, `previous` the one before; both have the shape and dtype of `live` and are read-only by
    agreement. Before the first average both hold zeros.

    Args:
        live, slots: three tensors of one shape and dtype.
        owned: [start, stop) of the slice that this rank owns.
        complete: for a slot, 0 or 1, the number of the average that is complete in it, 0 for none; where
            ranks share slots it knows of averages that this rank has not seen the end of.
    """

    def __init__(
        self,
        live: Tensor,
        slots: tuple[Tensor, Tensor],
        owned: tuple[int, int],
        complete: Callable[[int], int] | None = None,
    ) -> None:
        self.start, self.stop = owned
        self.live = live
        self.version = 0
        """The number of the average that `anchor` holds, from 1; 0 before the first."""
        # Half types are summed in float32: of bfloat16's 8 bits a sum over ranks would lose most.
        self._wide = live.dtype if live.dtype.itemsize >= 4 else torch.float32
        self._slots = slots
        self._newest = 0
        self._building = False
        self._averaged = False
        self._complete = complete
        self._stage: Tensor | None = None
        self.owned = torch.zeros(self.stop - self.start, dtype=self._wide)
        """After an average in slices: this rank's slice of the mean as its slice step left it. Where the
        wire carries a short type, its difference from the anchor is what the last rounding lost."""
        self.kept: SliceState | None = None
        """What its slice step keeps; None: nothing. See `Communicator.keep_state`."""
        self.in_full = False
        """Whether elements travel in its own type whatever the wire carries, as the values are no state whose
        differences from the anchor are small; the same on every rank."""
        self.staged: Tensor | None = None
        """What an average in the background works on: see `Communicator.staging`."""
        self.memory: object = None
        """What the communicator that made the buffer keeps with it."""

    @classmethod
    def private(cls, numel: int, dtype: torch.dtype, size: int, rank: int) -> Buffer:
        """A buffer in the memory of this process alone. Raises `TypeError` for a type not in `DTYPES`."""
        require_averageable(dtype)
        live, first, second = (torch.zeros(numel, dtype=dtype) for _ in range(3))
        return cls(live, (first, second), slice_bounds(numel, size, rank))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.live.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements of `live`, `anchor` and `previous`."""
        return self.live.dtype

    @property
    def wide(self) -> torch.dtype:
        """The type in which it is summed, and in which its slice step sees it."""
        return self._wide

    @property
    def num_bytes(self) -> int:
        """Bytes of `live`."""
        return self.numel * self.dtype.itemsize

    @property
    def anchor(self) -> Tensor:
        """x_t: the newest average that is complete on this rank."""
        return self._slots[self._newest]

    @property
    def previous(self) -> Tensor:
        """x_(t-1), while no average is under way; after a failed one, undefined."""
        return self._slots[1 - self._newest]

    def stage(self, share: float) -> Tensor:
        """`share` times live, in the type that sums are kept in; overwrites the slot that is not the
        anchor. A share of 0 gives zeros whatever live holds: 0 times not-a-number would not."""
        self._building = True
        if self._stage is None and self._wide is not self.dtype:
            self._stage = torch.empty(self.numel, dtype=self._wide)
        staged = self.previous if self._stage is None else self._stage
        if share == 0:
            return staged.zero_()
        if staged.dtype is self.dtype:
            return torch.mul(self.live, share, out=staged)
        return staged.copy_(self.live).mul_(share)

    def complete(self) -> None:
        """Makes what `stage` returned, now the whole average, the anchor, and copies it to live."""
        if self._stage is not None:
            self.previous.copy_(self._stage)
        self.advance()
        self.live.copy_(self.anchor)

    @property
    def next_slot(self) -> int:
        """Which of the two slots is not the anchor: where the next average is built."""
        return 1 - self._newest

    def advance(self) -> None:
        """The slot in which the average was built, and is complete, becomes the anchor."""
        self._newest = self.next_slot
        self._building = False
        self._averaged = True
        self.version += 1

    @property
    def has_anchor(self) -> bool:
        """Whether `anchor` holds an average yet."""
        return self._averaged

    @property
    def state(self) -> Tensor:
        """What the slice step of the newest complete average has kept: see `SliceState.own`."""
        assert self.kept is not None
        return self.kept.own(self._newest)

    @property
    def next_state(self) -> Tensor:
        """What the slice step of the average under way keeps; it becomes `state` when that is complete."""
        assert self.kept is not None
        return self.kept.own(self.next_slot)

    def averages(self) -> dict[int, Tensor]:
        """The complete averages that are still available here, by their numbers: at most two. Also after an
        average that failed."""
        return {version: self._slots[slot] for version, slot in self._complete_slots().items()}

    def state_of(self, number: int, start: int, stop: int) -> Tensor:
        """What the slice steps of average `number` have kept of the elements [start, stop), which must be
        readable: see `SliceState.values`. It must be this rank's newest one or one beside it, and complete on
        some rank. It need not be on this one: an average is complete nowhere before all slice steps are done.
        """
        assert self.kept is not None
        assert abs(number - self.version) <= 1
        slot = self._newest if number == self.version else self.next_slot
        return self.kept.values(slot, start, stop)

    def _complete_slots(self) -> dict[int, int]:
        if self._complete is not None:
            found = {self._complete(slot): slot for slot in (0, 1)}
        else:
            found = {self.version: self._newest}
            if not self._building:
                found[self.version - 1] = self.next_slot
        return {version: slot for version, slot in found.items() if version > 0}
