"""The average of a model's state over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from hvd_train.algorithm.distances import squared_distance
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.header import Header, Row, Work
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import Buffer
from hvd_train.errors import BitsDiffer, ConfigError, RanksDisagree
from hvd_train.run.model_state import unusual

PIECE_BYTES = 16 << 20
"""Bytes of a tensor that are sent at a time: the send copies them, and MPI counts in 31 bits."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a rank finds in its own state before an average; its part of the header."""

    finite: bool
    distance: float = -1.0
    change: float = -1.0
    moved: float = -1.0
    hash: int | None = None


class Average(Protocol):
    """What the training loop needs of an averager."""

    def start(self) -> None:
        """x_0 := the state of rank 0. Collective."""

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """Inspects this rank's state: whether it is finite; with `distance` how far it is from the anchor,
        and how far its parameters alone; with `verify` the hash of the last average, and how far that moved.
        Not collective."""

    def moved(self) -> float:
        """||mean - x_t||^2 of the last average, which was one with `verify`, over the slices that this rank
        owns. Not collective."""

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """Replaces the state by the weighted mean over the ranks. Returns whether there was any weight;
        without, the state is the anchor again. Collective.

        Args:
            verify: whether to take a hash of what was averaged, for the next `inspect`.
            rounds: done before this one, the same on every rank: what has a period of its own is averaged
                only where it is due. None: everything is averaged.
        """

    def rebind(self, comm: Communicator) -> str:
        """Goes on with the ranks of `comm`, those that survived the loss of others, from the newest complete
        average. Returns what was lost of it, in words; empty if nothing was. Collective.

        Raises `CommunicationError`, on every rank, where no average was complete, and `ConfigError` where
        nothing is averaged.
        """


class StateAverage:
    """Averages a `FlatState`.

    Args:
        step: what moves the parameters where they do not simply become the mean.
        parameters: whether the buffers that have the parameters alone, or the moments alone, are averaged,
            too; not where the parameters move in every local step. See `begin`.
        resumed: whether state that has a period of its own was restored on each rank, so that a start does
            not replace it.
    """

    def __init__(
        self,
        state: FlatState,
        comm: Communicator,
        step: OuterStep | None = None,
        *,
        parameters: bool = True,
        resumed: bool = False,
    ) -> None:
        self._state = state
        self._comm = comm
        self._step = OuterStep(state, comm, None) if step is None else step
        self._parameters = parameters
        self._buffers: dict[Part, Buffer] = {}
        self._resumed = resumed
        self._hash: int | None = None

    def start(self) -> None:
        """x_0 := the state of rank 0: an average in which only rank 0 has weight. What is not averaged, such
        as frozen parameters and integer buffers, is copied from rank 0, in pieces and in place. Only state
        with a period of its own, where it was restored, stays each rank's own. Collective.

        Raises `RanksDisagree`, on every rank, if the layouts differ.
        """
        self._agree_on_layout()
        self._state.place()
        self._buffers = self._state.buffers
        self._take_live_of_rank_0(keep_own=self._resumed)
        if self._parameters:
            self._step.place()
        for _, tensor in self._state.frozen():
            _take_from_rank_0(self._comm, tensor)
        self._hash = self._hash_of_live(self._in_every_round)

    def begin(self) -> None:
        """Averages parameters and moments as well from now on. All ranks must hold the same ones; an average
        in which only rank 0 has weight makes that their anchor. What has a period of its own stays each
        rank's own. Collective."""
        self._parameters = True
        newest = max((buffer.version for buffer in self._buffers.values()), default=0)
        for buffer in self._buffers.values():
            buffer.version = newest  # so far they were averaged more or less often
        self._take_live_of_rank_0(keep_own=True)
        self._step.place()
        self._hash = self._hash_of_live(self._in_every_round)

    def _take_live_of_rank_0(self, keep_own: bool) -> None:
        for part, buffer in self._buffers.items():
            own = buffer.live.clone() if keep_own and part.every > 1 else None
            buffer.in_full = True
            self._comm.average(buffer, 1.0 if self._comm.rank == 0 else 0.0)
            if own is not None:
                buffer.live.copy_(own)
        self._carry_gradients()

    def _carry_gradients(self) -> None:
        """Gradients are no small differences from the anchor."""
        for part, buffer in self._buffers.items():
            buffer.in_full = part.parameters and not self._parameters

    @property
    def _in_every_round(self) -> list[Part]:
        return [part for part in self._buffers if part.every == 1]

    def rebind(self, comm: Communicator) -> str:
        """See `Average`."""
        self._state.rebind(comm, in_every_step=not self._parameters)
        self._comm, self._buffers = comm, self._state.buffers
        self._carry_gradients()
        self._hash = self._hash_of_live(list(self._buffers))
        return self._step.rebind(comm)

    def _agree_on_layout(self) -> None:
        mine = self._state.layout()
        layouts = self._comm.allgather(mine)
        first = layouts[0]
        for rank, theirs in enumerate(layouts):
            if theirs != first:
                pairs = zip_longest(first, theirs, fillvalue="nothing")
                a, b = next((a, b) for a, b in pairs if a != b)
                raise RanksDisagree(
                    f"the models differ: rank 0 has `{a}` where rank {rank} has `{b}`. Build the same model "
                    "and optimizer on every rank."
                )

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """See `Average`. One pass over the state: a sum, or with `distance` the squared distance instead,
        shows whether all values are finite. Distances are of what is averaged in every round. Raises
        `ViewReplaced`, on this rank only, if a tensor was moved out of the flat state."""
        self._state.check_views()
        measured = self._in_every_round if distance else []
        summed = [buffer for part, buffer in self._buffers.items() if part not in measured]
        found = Inspection(finite=all(math.isfinite(flat_sum(buffer.live)) for buffer in summed))
        if distance:
            distances = [self._distances(part) for part in measured]
            change, far = (math.fsum(of) for of in (zip(*distances, strict=True) if distances else ((), ())))
            found = Inspection(finite=found.finite and math.isfinite(far), distance=far, change=change)
        return replace(found, moved=self.moved(), hash=self._hash) if verify else found

    def _distances(self, part: Part) -> tuple[float, float]:
        """||y_i - x_t||^2 over the parameters in a buffer, and over all of it."""
        buffer, cut = self._buffers[part], self._state.parameters_in(part)
        live, anchor = buffer.live, buffer.anchor
        change = squared_distance(live[:cut], anchor[:cut])
        return change, change + squared_distance(live[cut:], anchor[cut:])

    def moved(self) -> float:
        """See `Average`."""
        total = 0.0
        for part in self._in_every_round:
            buffer = self._buffers[part]
            owned = slice(buffer.start, buffer.stop)
            moved = self._step.moved.get(part)
            total += (
                squared_distance(buffer.anchor[owned], buffer.previous[owned]) if moved is None else moved
            )
        return total

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """See `Average`. An unhealthy rank takes the mean, and its optimizer begins anew where some of its
        state is not averaged."""
        due = [part for part in self._buffers if rounds is None or part.is_due(rounds)]
        buffers = {p: self._buffers[p] for p in due if self._parameters or not (p.parameters or p.moments)}
        steps = {part: self._step.on_slice(part, measure=verify) for part in buffers}
        averaged = [self._comm.average(b, weight, steps[part]) for part, b in buffers.items()]
        any_weight = any(averaged)
        if self._parameters:
            self._step.after_average(any_weight)
        self._hash = self._hash_of_live(due) if verify else None
        self._state.after_average(healthy)
        return any_weight

    def _hash_of_live(self, parts: Sequence[Part]) -> int:
        """A 64-bit hash (XXH3) of this rank's own copy of these parts of the state."""
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(self._buffers[part].live.view(torch.uint8).numpy().data)
        return digest.intdigest()


class NoAverage:
    """Never averages: every rank trains alone after the common start. The baseline `--sync none`."""

    def __init__(self, inner: StateAverage) -> None:
        self._inner = inner

    def start(self) -> None:
        """x_0 := the state of rank 0, so that all ranks start from the same state. Collective."""
        self._inner.start()

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """Whether this rank's state is finite; the ranks are meant to differ, nothing is compared."""
        return self._inner.inspect(distance=False, verify=False)

    def moved(self) -> float:
        """0: nothing is averaged."""
        return 0.0

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """Does nothing."""
        return False

    def rebind(self, comm: Communicator) -> str:
        """Raises `ConfigError`."""
        raise ConfigError(
            "sync.mode = 'none' cannot go on without the ranks that are lost: their models were theirs "
            "alone, and no average has them. Start again.",
            agreed=True,
        )


@torch.no_grad()
def _take_from_rank_0(comm: Communicator, tensor: Tensor) -> None:
    """tensor := that of rank 0, in place. Collective."""
    if unusual(tensor):
        # Not into an alias: copying gives a sparse tensor new indices and values.
        tensor.copy_(comm.broadcast(tensor.detach().clone()))
        return
    # Dimensions that were expanded are one element in memory.
    own = tensor.detach()[tuple(slice(1) if s == 0 else slice(None) for s in tensor.stride())]
    flat = own.contiguous().view(-1)
    values = flat.view(torch.uint8).numpy()
    for start in range(0, len(values), PIECE_BYTES):
        piece = values[start : start + PIECE_BYTES]
        received = comm.broadcast(piece)
        if comm.rank != 0:
            piece[:] = received
    if flat.data_ptr() != own.data_ptr():
        own.copy_(flat.view(own.shape))


def flat_sum(a: Tensor) -> float:
    """The sum of a flat tensor; float16 overflows above 65504, so that its sums need a wider type."""
    return float(a.sum(dtype=torch.float32) if a.dtype is torch.float16 else a.sum())


def drift(header: Header, moved: np.ndarray) -> float:
    """The mean squared distance of the y_i from their mean in the round of `header`: sum of w_i
    ||y_i - x_t||^2 minus ||mean - x_t||^2, as the variance is the mean of the squares minus the square of
    the mean.

    Args:
        moved: each rank's part of ||mean - x_t||^2.
    """
    distances = np.where(header.shares > 0, header["distance"], 0.0)
    return max(0.0, float((header.shares * distances).sum() - moved.sum()))


def check_bits(header: Header) -> None:
    """Raises `BitsDiffer`, on every rank, if the ranks did not hold the same bits after the last average."""
    unlike = header.unlike()
    if unlike:
        raise BitsDiffer(
            f"after the last average ranks {unlike} did not hold the same bits as rank 0. Expected identical "
            "parameters: memory or network may be faulty, or a program wrote to the parameters after the "
            "average."
        )


def report(
    inspection: Inspection,
    work: Work,
    *,
    stop: bool = False,
    observe: bool = False,
    communication_s: float = 0.0,
    wait_s: float = 0.0,
) -> Row:
    """The header row of a rank: what it found in its state, what it did, and the other fields of `Row`."""
    halves = (-1, -1) if inspection.hash is None else divmod(inspection.hash, 1 << 32)
    return Row(
        finite=float(inspection.finite),
        distance=inspection.distance,
        change=inspection.change,
        moved=inspection.moved,
        hash_high=float(halves[0]),
        hash_low=float(halves[1]),
        samples=work.samples,
        loss_sum=work.loss_sum,
        stop=float(stop),
        observe=float(observe),
        data_s=work.data_s,
        compute_s=work.compute_s,
        communication_s=communication_s,
        wait_s=wait_s,
        steps=float(work.steps),
        epoch=work.epoch,
        **{f"{reason}_rows": float(rows) for reason, rows in work.left_out.items()},
    )
