"""Averaging in shared memory within a host and by rings of messages between hosts.

The parameters themselves are in memory that the ranks of a host have mapped. On one host every rank reduces
the slice that it owns with plain loads and stores: no staging, no message. Between hosts the sums of the
hosts go round in rings of MPI messages, one ring for each rank of a host. See docs/ring.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from hvd_train.comm.base import Communicator, OnSlice, Op, Pending
from hvd_train.comm.buffer import DTYPES, Buffer, require_averageable, slice_bounds
from hvd_train.comm.in_background import InBackground
from hvd_train.comm.phases import agree_on_layout, agree_on_shares, row_of, shares_of
from hvd_train.comm.ring_hosts import find_hosts
from hvd_train.comm.slice_state import SliceState
from hvd_train.environment import machine
from hvd_train.errors import (
    BarrierTimeout,
    CommunicationError,
    EnvironmentMismatch,
    HvdTrainError,
    RankLost,
    WireOverflow,
)

try:
    from hvd_train.comm import _shm
except ImportError as error:
    raise EnvironmentMismatch(
        f"the backend `ring` is not built ({error}). Install the package where a C++ compiler and CMake are "
        "found, or choose `--backend mpi`."
    ) from None
try:
    from hvd_train.comm import _ring
except ImportError:
    _ring = None  # type: ignore[assignment]

T = TypeVar("T")

WIRES = ("float32", "bfloat16", "float16", "int8")
"""What can carry an element between hosts, in the order of their codes; float64 travels as float64 under the
first."""

_OPS = {Op.SUM: _shm.Op.SUM, Op.MIN: _shm.Op.MIN, Op.MAX: _shm.Op.MAX}

_SPINS = 20_000
"""Polls for the others before a rank goes to sleep: some tenths of a millisecond."""

_PHASES = {
    _shm.Phase.LOCAL_STEPS: "local steps",
    _shm.Phase.AGREEMENT: "agreement",
    _shm.Phase.REDUCE: "reduce",
    _shm.Phase.REDUCE_SCATTER: "reduce-scatter",
    _shm.Phase.SLICE_STEP: "slice step",
    _shm.Phase.ALL_GATHER: "all-gather",
    _shm.Phase.CLOSING: "closing barrier",
}

_FAILURES: tuple[type[Exception], ...] = (_shm.RankDied, _shm.Stalled, RankLost)
if _ring is not None:
    _FAILURES += (_ring.PeerLost, _ring.PeerStalled, _ring.MPIFailure, _ring.Overflow)


@dataclass
class _Memory:
    """The memory of a buffer's tensors."""

    flat: _shm.FlatBuffer
    staged: _shm.FlatBuffer | None = None
    """The same anchors under the memory of `Buffer.staged`."""


class RingCommunicator(Communicator):
    """The ranks of `inner`, which connects them and exchanges small Python values. The constructor is
    collective.

    Args:
        inner: on several hosts it must have MPI (`mpi_comm`).
        wire: what carries an element between hosts, one of `WIRES`. The short types carry differences from
            the anchor, never the values themselves; the first average of a buffer, which has no anchor yet,
            travels in full.

    Raises `EnvironmentMismatch`, on every rank, if there are several hosts and the messages between them
    cannot be sent: the extension for it is not built, or `inner` has no MPI.
    """

    def __init__(self, inner: Communicator, wire: str = "float32") -> None:
        super().__init__(inner.liveness)
        self._inner = inner
        self._wire = WIRES.index(wire)
        self._pending: Pending | None = None
        self._hosts = hosts = find_hosts(inner)
        self.name = "ring"
        self.rank, self.size, self.host = inner.rank, inner.size, inner.host
        self.local_rank, self.local_size = hosts.local_rank, len(hosts.local)
        self.num_hosts = len(hosts.ranks)
        self.library = f"shared memory, started by {inner.library}"
        self.loses_ranks = inner.loses_ranks
        self._team = self._gather_team()
        self._ring = self._connect_hosts() if self.num_hosts > 1 else None
        self.averages_in_background = self._ring is not None  # on one host it would take their cores

    def _gather_team(self) -> _shm.Team:
        num_bytes = _shm.Team.num_bytes(self.local_size)
        memory = self._hosts.share(self._inner, num_bytes)
        if self.local_rank == 0:
            memory.allocate(0, num_bytes)
        self._inner.barrier()
        cores = self._inner.allgather(machine.AFFINITY)
        enough = len(frozenset().union(*(cores[r] for r in self._hosts.local))) >= self.local_size
        team = _shm.Team(memory, self.local_rank, self.local_size, _SPINS if enough else 0)
        self._inner.barrier()  # every rank must have joined the team before its first barrier
        return team

    def _connect_hosts(self) -> _ring.Ring:
        inner = self._inner
        without = [r for r, ready in enumerate(inner.allgather(_ring is not None)) if not ready]
        handle = None if without else inner.mpi_comm()
        if handle is None:
            why = f"ranks {without} lack the extension for it" if without else f"{inner.library} is not MPI"
            raise EnvironmentMismatch(
                f"backend `ring` cannot average over {self.num_hosts} hosts: {why}. Install the package "
                "where mpicxx is found and start it by mpirun or srun, or choose another backend.",
                agreed=True,
            )
        self.library = f"shared memory, {inner.library} between hosts, {WIRES[self._wire]} on the wire"
        return _ring.Ring(handle, self._hosts.ranks, self._hosts.host, self.local_rank)

    @property
    def payload_bytes(self) -> int:
        """Bytes that this rank has given to MPI for other hosts in averages so far. Not collective."""
        return self._ring.payload_bytes if self._ring else 0

    def phase(self, rank: int) -> str:
        """What a rank of this host is doing: `local steps`, or a phase of an average. Not collective."""
        return _PHASES[self._team.phase(self._hosts.local.index(rank))]

    def _phase_of_average(self, rank: int) -> str:
        """What a rank of this host is doing, if it is in an average."""
        phase = self.phase(rank)
        return "" if phase == _PHASES[_shm.Phase.LOCAL_STEPS] else phase

    def buffer(self, numel: int, dtype: torch.dtype) -> Buffer:
        """A buffer whose live tensor is in memory that all ranks of the host have mapped, and whose anchors
        they share. Collective.

        Raises `TypeError` for a type that is not in `DTYPES`, and, on every rank, `SizeMismatch` where the
        ranks ask for different buffers and `MemoryError` where a host has not enough memory.
        """
        self._require_idle()
        require_averageable(dtype)
        agree_on_layout(self._inner.allgather((numel, DTYPES.index(dtype))))
        code = DTYPES.index(dtype)
        num_bytes = _shm.FlatBuffer.num_bytes(self.local_size, numel, code)
        region = self._hosts.share(self._inner, num_bytes)
        flat = _shm.FlatBuffer(region, self.local_rank, self.local_size, numel, code)
        self._hosts.back(self._inner, flat.allocate, num_bytes)
        region.seal()
        live, first, second = (
            torch.from_numpy(a).view(dtype) for a in (flat.input(), flat.anchor(0), flat.anchor(1))
        )
        buffer = Buffer(live, (first, second), self.owned(numel), flat.complete)
        buffer.memory = _Memory(flat)
        return buffer

    def owned(self, numel: int) -> tuple[int, int]:
        """See `Communicator.owned`. Between hosts a slice is a part of that of the host."""
        return self._ring.owned(numel) if self._ring else slice_bounds(numel, self.size, self.rank)

    def keep_state(self, buffer: Buffer, num_values: int) -> None:
        """See `Communicator.keep_state`. The ranks of the host map the values of all elements, and each backs
        those that it owns with memory."""
        self._require_idle()
        row = buffer.numel * buffer.wide.itemsize
        region = self._hosts.share(self._inner, 2 * num_values * row)
        start, stop = (buffer.wide.itemsize * at for at in (buffer.start, buffer.stop))

        def allocate() -> None:
            for values in range(2 * num_values):
                region.allocate(values * row + start, stop - start)

        self._hosts.back(self._inner, allocate, 2 * num_values * row)
        region.seal()
        values = torch.from_numpy(region.array()).view(buffer.wide).view(2, num_values, buffer.numel)
        owned = self._inner.allgather((buffer.start, buffer.stop))
        starts, stops = zip(*(owned[r] for r in self._hosts.local), strict=True)  # one after the other
        readable = min(starts), max(stops)
        buffer.kept = SliceState((values[0], values[1]), 0, owned[self.rank], readable)

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        """See `Communicator.average`. Between two barriers every rank reads its slices of all live tensors
        of its host, in rank order, and writes the mean to all of them and to the next anchor; in one pass,
        but for a slice step. Raises `WireOverflow`, on every rank, too."""
        self._require_idle()
        with self._waiting(buffer.num_bytes):
            operation = self._prepare(buffer, self._memory(buffer).flat, weight, self.liveness.hooks)
            if operation is None:
                buffer.live.copy_(buffer.anchor)
                return False
            if on_slice is None:
                operation.run()
            else:
                operation.reduce()
                on_slice(buffer.owned, buffer.start)
                operation.spread()
        buffer.advance()
        return True

    @contextmanager
    def _waiting(self, num_bytes: int = 0) -> Iterator[None]:
        """Around a collective call: counts it, and translates its failures to the errors of this package."""
        try:
            with self.liveness.call(num_bytes):
                yield
        except _FAILURES as error:
            raise self._explain(error) from None

    def _prepare(
        self, buffer: Buffer, flat: _shm.FlatBuffer, weight: float, hooks: int
    ) -> _shm.Operation | None:
        """The average as an object, which asks `hooks` while it waits; None where there is no weight.
        Collective."""
        self._team.enter(_shm.Phase.AGREEMENT)
        if self._ring is None:
            row, patience = row_of(buffer, weight), (self.liveness.allowed_s, self.liveness.hooks)
            shares = shares_of(self._team.gather(row, *patience))
        else:
            shares = agree_on_shares(self, buffer, weight)
        if shares is None:
            self._team.enter(_shm.Phase.LOCAL_STEPS)
            return None
        mine = [shares[r] for r in self._hosts.local]
        slot, number, owned = buffer.next_slot, buffer.version + 1, buffer.owned.data_ptr()
        timeout_s = self.liveness.allowed_s
        if self._ring is None:
            return _shm.HostAverage(self._team, flat, mine, slot, number, owned, timeout_s, hooks)
        wire = self._wire if buffer.has_anchor and not buffer.in_full else 0
        return _ring.RingAverage(
            self._ring, self._team, flat, mine, slot, number, owned, timeout_s, hooks, wire
        )

    def staging(self, buffer: Buffer) -> Tensor:
        """See `Communicator.staging`. The ranks of the host map the memory of all of them."""
        self._require_idle()
        memory = self._memory(buffer)
        if buffer.staged is None:
            code = DTYPES.index(buffer.dtype)
            num_bytes = _shm.FlatBuffer.staging_bytes(self.local_size, buffer.numel, code)
            region = self._hosts.share(self._inner, num_bytes)
            memory.staged = memory.flat.staged(region)
            self._hosts.back(self._inner, memory.staged.allocate, num_bytes)
            region.seal()
            buffer.staged = torch.from_numpy(memory.staged.input()).view(buffer.dtype)
        return buffer.staged

    def start_average(
        self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None, *, staged: bool = False
    ) -> Pending:
        """See `Communicator.start_average`. A thread without Python does the work; with a slice step it does
        the reduce-scatter, and `wait` the rest."""
        values, flat = self.staging(buffer), self._memory(buffer).staged
        assert flat is not None
        if not staged:
            values.copy_(buffer.live)
        with self._waiting():
            # Signs are for the thread that trains: the one that averages waits for the timeout alone.
            operation = self._prepare(buffer, flat, weight, hooks=0)
            if operation is not None:
                operation.start(on_slice is not None)
        waiting = partial(self._waiting, buffer.num_bytes)
        self._pending = InBackground(buffer, values, operation, on_slice, waiting, self._end_pending)
        return self._pending

    def _end_pending(self) -> None:
        self._pending = None

    def _memory(self, buffer: Buffer) -> _Memory:
        if not isinstance(buffer.memory, _Memory):
            raise TypeError("this buffer belongs to another communicator; make one with `buffer` of this one")
        return buffer.memory

    def _require_idle(self) -> None:
        if self._pending is not None:
            raise CommunicationError(
                "an average started by `start_average` is still pending: call `wait` on it first."
            )

    def _explain(self, error: Exception, timeout_s: float | None = None) -> HvdTrainError:
        """The error to raise for one of `_FAILURES`. A loss is passed on to those that cannot see it: what
        died on this host to the other hosts, what MPI saw to this host."""
        where = self.where
        if isinstance(error, _shm.Stalled):
            late = {self._hosts.local[r]: "" for r in self._team.late()}
            if timeout_s is not None:
                names = ", ".join(map(str, late))
                message = f"{where}: ranks {names} did not arrive at the barrier within {timeout_s:g} s."
                return BarrierTimeout(message, list(late))
            return self.liveness.error(where, {r: self._phase_of_average(r) for r in late})
        if _ring is not None and isinstance(error, _ring.PeerStalled):
            return self.liveness.error(where, {self._ring.late: ""} if self._ring else {})
        if _ring is not None and isinstance(error, _ring.Overflow):
            return WireOverflow(
                f"{error} ({WIRES[self._wire]}), or is not finite. Choose `--wire float32` or bfloat16, or a "
                "smaller learning rate."
            )
        # MPI may report another error when a peer dies in the middle of a message.
        if _ring is not None and isinstance(error, _ring.MPIFailure) and not self._inner.has_lost():
            return CommunicationError(f"{where}: {error}")
        self._team.revoke()
        self._inner.revoke()
        if isinstance(error, RankLost):
            return error
        dead = [self._hosts.local[r] for r in self._team.dead()]
        return RankLost(f"{where}: {f'ranks {dead} of this host died' if dead else error}")

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        self._require_idle()
        sent = np.ascontiguousarray(values, dtype=np.float64)
        # Not by `_waiting`, which takes longer than the call.
        try:
            with self.liveness as patience:
                if self._ring is not None or sent.size > _shm.Team.max_values:
                    return self._inner.allreduce(sent, op)
                reduced = self._team.allreduce(sent.ravel(), _OPS[op], patience.allowed_s, patience.hooks)
                return reduced.reshape(sent.shape)
        except _FAILURES as error:
            raise self._explain(error) from None

    def broadcast(self, value: T, root: int = 0) -> T:
        self._require_idle()
        with self._waiting():
            return self._inner.broadcast(value, root)

    def allgather(self, value: T) -> list[T]:
        self._require_idle()
        with self._waiting():
            return self._inner.allgather(value)

    def barrier(self, timeout_s: float | None = None) -> None:
        self._require_idle()
        try:
            with self.liveness:
                if self._ring is not None:
                    self._inner.barrier(timeout_s)
                elif timeout_s is None:
                    self._team.barrier(self.liveness.allowed_s, self.liveness.hooks)
                else:
                    self._team.barrier(timeout_s)
        except _FAILURES as error:
            raise self._explain(error, timeout_s) from None

    def survivors(self) -> RingCommunicator:
        """See `Communicator.survivors`. The surviving ranks get new shared memory; `recover` then moves the
        buffers to it."""
        return RingCommunicator(self._inner.survivors(), WIRES[self._wire])

    def _abort(self, code: int) -> NoReturn:
        self._inner._abort(code)

    def close(self) -> None:
        self._inner.close()
