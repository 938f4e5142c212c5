"""Averaging by MPI's own collectives, through mpi4py, on the flat buffers. Nothing to compile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from hvd_train.comm import _mpi
from hvd_train.comm.base import Buffer, Communicator, OnSlice, Op, slice_bounds
from hvd_train.comm.phases import average_in_phases
from hvd_train.errors import BarrierTimeout, CommunicationError, RankLost

T = TypeVar("T")

_ARRIVED, _RELEASED = 1, 2
"""Message tags of `barrier`."""


class MPICommunicator(Communicator):
    """All ranks of MPI_COMM_WORLD, on a duplicate of it. Making one is collective; it initialises MPI.

    Args:
        comm: a communicator of mpi4py to use, and to own, instead: ranks that are left of a world.
    """

    def __init__(self, comm: Any = None) -> None:
        self._mpi = _mpi.load()
        _mpi.start(self._mpi)
        self.name = "mpi"
        self.library = _mpi.library_version(self._mpi)
        self.loses_ranks = _mpi.tolerates_faults(self._mpi)
        self.host = self._mpi.Get_processor_name()
        self._ops = {Op.SUM: self._mpi.SUM, Op.MIN: self._mpi.MIN, Op.MAX: self._mpi.MAX}
        self._comm = self._mpi.COMM_WORLD.Dup() if comm is None else comm
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._private: list[Any] = []
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        with self._errors("finding the ranks of each host"):
            on_host = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        members = self._ranks(on_host.Get_group())
        on_host.Free()
        self.local_rank, self.local_size = members.index(self.rank), len(members)
        self.num_hosts = len(set(self.allgather(members[0])))

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._mpi.Exception as error:
            where = f"{what} failed on rank {self.rank} of {self.size} ({self.host})"
            if self.loses_ranks and _mpi.is_loss(self._mpi, error):
                # Others may wait for this rank, which will not come, and need not have seen the death.
                self.revoke()
                raise RankLost(f"{where}: {self._died()}.") from error
            raise CommunicationError(f"{where}: {error}") from error

    def _died(self) -> str:
        dead = self._ranks(self._comm.Get_failed())
        if not dead:
            return "another rank says that one died"
        return f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} died"

    def _ranks(self, group: Any) -> list[int]:
        """The ranks of a group, ascending, as this communicator counts them; frees the group. Not
        collective."""
        everybody = self._comm.Get_group()
        found: list[int] = sorted(group.Translate_ranks(None, everybody))
        everybody.Free()
        group.Free()
        return found

    def private_comm(self) -> int:
        """The address of an MPI_Comm that nobody else uses: a duplicate, whose calls return their errors. It
        is revoked and freed with this communicator. Collective."""
        with self._errors("duplicating the communicator"):
            comm = self._comm.Dup()
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._private.append(comm)
        return int(self._mpi._addressof(comm))

    def revoke(self) -> None:
        if self.loses_ranks:
            for comm in (self._comm, *self._private):
                comm.Revoke()

    def survivors(self) -> Communicator:
        if not self.loses_ranks:
            return super().survivors()
        self.revoke()
        new = None
        while new is None:
            new = self._without_dead()
        self._free()
        return new

    def _without_dead(self) -> MPICommunicator | None:
        """One attempt of `survivors`; None, on every rank that lives, if one more died meanwhile."""
        comm = self._comm.Shrink()
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        try:
            new = MPICommunicator(comm)
        except RankLost:
            new = None
        try:
            if comm.Agree(int(new is not None)):
                return new
        except self._mpi.Exception as error:
            if not _mpi.is_loss(self._mpi, error):
                raise
        comm.Free()
        return None

    def _counts(self, numel: int) -> list[int]:
        bounds = (slice_bounds(numel, self.size, r) for r in range(self.size))
        return [stop - start for start, stop in bounds]

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        with self._errors("reduce-scatter"):
            self._comm.Reduce_scatter(
                staged.numpy(), owned.numpy(), self._counts(staged.numel()), self._mpi.SUM
            )

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        with self._errors("all-gather"):
            self._comm.Allgatherv(owned.numpy(), (staged.numpy(), self._counts(staged.numel())))

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        sent = np.ascontiguousarray(values, dtype=np.float64)
        result = np.empty_like(sent)
        with self._errors("allreduce"):
            self._comm.Allreduce(sent, result, self._ops[op])
        return result

    def broadcast(self, value: T, root: int = 0) -> T:
        with self._errors("broadcast"):
            received: T = self._comm.bcast(value, root)
        return received

    def allgather(self, value: T) -> list[T]:
        with self._errors("all-gather of values"):
            received: list[T] = self._comm.allgather(value)
        return received

    def barrier(self, timeout_s: float) -> None:
        # MPI's barrier cannot say who is missing. Here rank 0 hears from each rank and tells each rank who
        # did not come; the others grant it twice the time, so that its answer is heard before they give up.
        deadline = time.monotonic() + timeout_s
        with self._errors("barrier"):
            if self.rank == 0:
                self._collect(deadline, timeout_s)
            else:
                self._report(deadline + timeout_s, timeout_s)

    def _collect(self, deadline: float, timeout_s: float) -> None:
        arrived = np.zeros(self.size, dtype=np.uint8)
        arrived[0] = 1
        pending = [self._comm.Irecv(arrived[r : r + 1], r, _ARRIVED) for r in range(1, self.size)]
        # Each one: Testall does not say that it was a death that failed it.
        _wait(lambda: sum(not request.Test() for request in pending) == 0, deadline)
        for rank in np.flatnonzero(arrived[1:]) + 1:
            self._comm.Send(arrived, int(rank), _RELEASED)
        self._check(arrived, timeout_s)

    def _report(self, deadline: float, timeout_s: float) -> None:
        arrived = np.zeros(self.size, dtype=np.uint8)
        self._comm.Send(np.ones(1, dtype=np.uint8), 0, _ARRIVED)
        release = self._comm.Irecv(arrived, 0, _RELEASED)
        if not _wait(release.Test, deadline):
            raise BarrierTimeout(f"rank 0 did not arrive at the barrier within {timeout_s:g} s.", missing=[0])
        self._check(arrived, timeout_s)

    def _check(self, arrived: np.ndarray, timeout_s: float) -> None:
        missing = [int(r) for r in np.flatnonzero(arrived == 0)]
        if missing:
            names = ", ".join(map(str, missing))
            raise BarrierTimeout(
                f"ranks {names} did not arrive at the barrier within {timeout_s:g} s.", missing
            )

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        self._free()
        _mpi.stop(self._mpi)

    def _free(self) -> None:
        for comm in (*self._private, self._comm):
            comm.Free()
        self._private.clear()


def _wait(done: Any, deadline: float) -> bool:
    """Polls `done` until it holds or the deadline passes, backing off from spinning to 1 ms."""
    pause = 1e-6
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 1e-3)
    return True
