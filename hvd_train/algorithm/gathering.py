"""The optimizer's state of all slices, gathered into the optimizer of the whole model on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvd_train.algorithm.averaging import PIECE_BYTES
from hvd_train.algorithm.flat_state import Entry, FlatState
from hvd_train.algorithm.optimizer_state import COUNTERS, as_real, materialise, sparse_parameters
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.comm.base import Communicator


@torch.no_grad()
def gather_state(flat: FlatState, comm: Communicator, sliced: SlicedOptimizer, whole: Optimizer) -> None:
    """Moments and counters of `whole` := those that the owners of the pieces hold, the same bits on every
    rank; moments of half types, which slices hold in float32, are rounded once. State that `whole` lacks is
    created; tensors that it has are written in place, as they may be views of `flat`. What an average resets
    is left out. Collective.

    Every owner sends its piece of each moment in at most 16 MiB at a time.
    """
    if not flat.has_moments and flat.resets(""):
        return  # it is created in the next local step
    names: dict[nn.Parameter, str] = {p: name for name, p in flat.model.named_parameters()}
    list(materialise(whole, names, sparse_parameters(flat.model)))
    bounds = comm.allgather(list(sliced.pieces.owned.values()))
    for i, part in enumerate(sliced.pieces.parts):
        held = {piece.entry.start: sliced.held(piece) for piece in sliced.pieces.of(part)}
        for entry in sliced.pieces.entries[part]:
            spans = [(max(a, entry.start), min(b, entry.stop)) for a, b in (of[i] for of in bounds)]
            owners = {rank: span for rank, span in enumerate(spans) if span[0] < span[1]}
            own = held.get(entry.start, {})
            for key, value in sorted(_state_of(whole, entry).items()):
                if key in COUNTERS:
                    first = min(owners)
                    value.copy_(comm.broadcast(own[key].clone() if comm.rank == first else value, first))
                elif not flat.resets(key):
                    _gather(comm, entry, owners, own.get(key), value)


def _state_of(whole: Optimizer, entry: Entry) -> dict[str, Tensor]:
    state = whole.state[entry.holder]
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _gather(
    comm: Communicator, entry: Entry, owners: dict[int, tuple[int, int]], own: Tensor | None, value: Tensor
) -> None:
    """One moment of one parameter, whose elements are in the order of the parameter's memory."""
    real = as_real(value)
    wide = real.dtype if real.dtype.itemsize >= 4 else torch.float32
    laid = torch.empty(entry.stop - entry.start, dtype=wide)
    if real.stride() == entry.stride and real.dtype is wide:
        laid = real.as_strided(laid.shape, (1,))  # no copy
    length = PIECE_BYTES // wide.itemsize
    for rank, (first, last) in owners.items():
        span = laid[first - entry.start : last - entry.start]
        if rank == comm.rank:
            assert own is not None  # it owns a piece
            span.copy_(own)
        for start in range(0, len(span), length):
            values = span[start : start + length].numpy()
            received = comm.broadcast(values, rank)
            if rank != comm.rank:
                values[:] = received
    if laid.data_ptr() != real.data_ptr():
        real.copy_(laid.as_strided(entry.size, entry.stride))
