"""Averaging in shared memory: the parameters lie there, and every rank reduces the slice that it owns with
plain loads and stores. No staging, no message.

Today for the ranks of one host; another communicator, which knows only how to exchange small values, brings
them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from hvd_train import machine
from hvd_train.comm.base import DTYPES, Buffer, Communicator, OnSlice, Op, require_averageable
from hvd_train.comm.phases import agree_on_shares
from hvd_train.errors import BarrierTimeout, EnvironmentMismatch, RankLost

try:
    from hvd_train.comm import _shm
except ImportError as error:
    raise EnvironmentMismatch(
        f"the backend `ring` is not built ({error}). Install the package where a C++ compiler and CMake are "
        "found, or choose `--backend mpi`."
    ) from None

T = TypeVar("T")

STALL_TIMEOUT_S = 300.0
"""Seconds after which a rank that waits for another gives up."""

_OPS = {Op.SUM: _shm.Op.SUM, Op.MIN: _shm.Op.MIN, Op.MAX: _shm.Op.MAX}

_SPINS = 20_000
"""Looks for the others before a rank goes to sleep: some tenths of a millisecond."""


class RingCommunicator(Communicator):
    """The ranks of `inner`, which must all be on one host. Making one is collective.

    Raises `EnvironmentMismatch`, on every rank, if they are not: each rank must be able to read a number from
    a peer's memory, whatever the hosts are called.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.name = "ring"
        self.library = f"shared memory, started by {inner.library}"
        self.rank, self.size = inner.rank, inner.size
        self.local_rank, self.local_size = inner.local_rank, inner.local_size
        self.host, self.num_hosts = inner.host, inner.num_hosts
        memory = self._share(_shm.Team.num_bytes(self.size))
        if self.rank == 0:
            memory.allocate(0, _shm.Team.num_bytes(self.size))
        inner.barrier(STALL_TIMEOUT_S)
        self._team = _shm.Team(memory, self.rank, self.size, self._spins())
        inner.barrier(STALL_TIMEOUT_S)  # every seat must be taken before the first barrier

    def _spins(self) -> int:
        cores = frozenset().union(*self._inner.allgather(machine.AFFINITY))
        return _SPINS if len(cores) >= self.size else 0

    def _share(self, num_bytes: int) -> _shm.Region:
        """A region that rank 0 makes and every rank maps. Collective."""
        region = _shm.Region.create(num_bytes) if self.rank == 0 else None
        address = self._inner.broadcast(region.address() if region else b"")
        seen = region is not None or _shm.Region.is_visible(address)
        blind = [r for r, sees in enumerate(self._inner.allgather(seen)) if not sees]
        if blind:
            error = EnvironmentMismatch(
                f"backend `ring` averages within one host, but ranks {blind} share no memory with rank 0. "
                "Choose `--backend mpi`."
            )
            error.agreed = True
            raise error
        mapped = region or _shm.Region.open(address)
        self._inner.barrier(STALL_TIMEOUT_S)
        return mapped

    def buffer(self, numel: int, dtype: torch.dtype) -> Buffer:
        """A buffer whose live tensor lies in memory that all ranks of the host have mapped, and whose anchors
        they share. Collective.

        Raises `TypeError` for a type that is not in `DTYPES`, and `MemoryError`, on every rank, where the
        host has not enough memory.
        """
        require_averageable(dtype)
        code = DTYPES.index(dtype)
        region = self._share(_shm.FlatBuffer.num_bytes(self.size, numel, code))
        flat = _shm.FlatBuffer(region, self.rank, self.size, numel, code)
        self._allocate(flat, numel, dtype)
        region.seal()
        live, first, second = (
            torch.from_numpy(a).view(dtype) for a in (flat.live(), flat.anchor(0), flat.anchor(1))
        )
        buffer = Buffer(live, (first, second), self.size, self.rank)
        buffer.memory = flat
        return buffer

    def _allocate(self, flat: _shm.FlatBuffer, numel: int, dtype: torch.dtype) -> None:
        # Before anybody writes: the first touch of memory that a container does not have ends the process.
        try:
            flat.allocate()
            failed = False
        except MemoryError:
            failed = True
        short = [r for r, f in enumerate(self._inner.allgather(failed)) if f]
        if short:
            num_bytes = (self.size + 2) * numel * dtype.itemsize
            raise MemoryError(
                f"ranks {short} have no memory for their part of {num_bytes:,} bytes: {self.size} copies and "
                "two anchors. Use fewer ranks per host, or a larger memory limit."
            )

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        """See `Communicator.average`. Between two barriers every rank reads its slice of all live tensors, in
        rank order, and writes the mean to all of them and to the next anchor; in one pass, but for a slice
        step."""
        shares = agree_on_shares(self, buffer, weight)
        if shares is None:
            buffer.live.copy_(buffer.anchor)
            return False
        flat, slot = self._flat(buffer), buffer.next_slot
        if on_slice is None:
            flat.average(shares.tolist(), slot)
        else:
            flat.reduce(shares.tolist(), buffer.owned.data_ptr())
            on_slice(buffer.owned, buffer.start)
            flat.spread(buffer.owned.data_ptr(), slot)
        self.barrier(STALL_TIMEOUT_S)
        buffer.advance()
        return True

    def _flat(self, buffer: Buffer) -> _shm.FlatBuffer:
        if not isinstance(buffer.memory, _shm.FlatBuffer):
            raise TypeError("this buffer is not of this communicator; make one by its `buffer`")
        return buffer.memory

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _shm.RankDied as error:
            raise RankLost(f"rank {self.rank} of {self.size} ({self.host}): {error}") from None

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        sent = np.ascontiguousarray(values, dtype=np.float64)
        if sent.size > _shm.Team.max_values:
            return self._inner.allreduce(sent, op)
        with self._errors():
            reduced = self._team.allreduce(sent.ravel(), _OPS[op], STALL_TIMEOUT_S)
        return reduced.reshape(sent.shape)

    def broadcast(self, value: T, root: int = 0) -> T:
        return self._inner.broadcast(value, root)

    def allgather(self, value: T) -> list[T]:
        return self._inner.allgather(value)

    def barrier(self, timeout_s: float) -> None:
        with self._errors():
            missing = self._team.barrier(timeout_s)
        if missing:
            names = ", ".join(map(str, missing))
            raise BarrierTimeout(
                f"ranks {names} did not arrive at the barrier within {timeout_s:g} s.", missing
            )

    def abort(self, code: int) -> None:
        self._inner.abort(code)

    def close(self) -> None:
        self._inner.close()
