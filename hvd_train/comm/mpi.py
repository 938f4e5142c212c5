"""Averaging by MPI's own collectives, through mpi4py, on the flat buffers. Nothing to compile."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from hvd_train.comm import _mpi, _ulfm
from hvd_train.comm.base import Buffer, Communicator, OnSlice, Op, slice_bounds
from hvd_train.comm.launcher import require_way_in
from hvd_train.comm.phases import average_in_phases
from hvd_train.errors import BarrierTimeout, CommunicationError, RankLost

T = TypeVar("T")

_ARRIVED, _RELEASED = 1, 2
"""Message tags of `barrier`."""

_GO_ON = -1
"""What a rank that does not give up brings to the agreement with those that do: neutral under "and"."""

_ROLL_CALL = 0.1
"""How long ranks that gave up waiting look for who is missing, as a part of the time that they waited."""

_PARTING_S = 30.0
"""How long a rank that gives up waits for the others, which may be in their local steps."""


class MPICommunicator(Communicator):
    """All ranks of MPI_COMM_WORLD, on a duplicate of it. Making one is collective; it initialises MPI.

    Raises `LauncherMismatch` where it is certain that MPI would find this process alone.

    Args:
        comm: a communicator of mpi4py to use, and to own, instead: ranks that are left of a world.
    """

    def __init__(self, comm: Any = None) -> None:
        self._mpi = _mpi.load()
        self.name = "mpi"
        self.library = _mpi.library_version(self._mpi)
        if comm is None:
            require_way_in(self._mpi.Get_library_version())
        _mpi.start(self._mpi)
        world = self._mpi.COMM_WORLD
        self.loses_ranks = _ulfm.is_on(self._mpi)
        self.host = self._mpi.Get_processor_name()
        self._comm = comm or world
        self._owned: list[Any] = []
        """Freed in the end, and not before: to make a communicator while another rank's word that one of the
        same number is revoked is still under way crashes Open MPI."""
        self._private: list[Any] = []
        self._ops = {Op.SUM: self._mpi.SUM, Op.MIN: self._mpi.MIN, Op.MAX: self._mpi.MAX}
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if comm is None:
            self._comm = self._derive(world)
        with self._errors("finding the ranks of each host"):
            on_host = self._comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        members = _ulfm.ranks(self._comm, on_host.Get_group())
        on_host.Free()
        self.local_rank, self.local_size = members.index(self.rank), len(members)
        self.num_hosts = len(set(self.allgather(members[0])))

    def _derive(self, parent: Any) -> Any:
        """A duplicate of `parent`, which ends with this communicator. Collective."""
        with self._errors("duplicating the communicator"):
            comm = parent.Dup()
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._owned.append(comm)
        return comm

    @contextmanager
    def _errors(self, what: str, confirmed: bool = True) -> Iterator[None]:
        """Gives what fails in a call to MPI the errors of this package. Where ranks can be lost, and the call
        is to be `confirmed`, it is collective, and nobody goes on before the call went well everywhere."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        stalled = confirmed and isinstance(failed, BarrierTimeout)  # so would be an agreement
        if self.loses_ranks and not stalled and not self._went_well(failed, confirmed):
            raise self._lost(what) from failed
        if isinstance(failed, self._mpi.Exception):
            where = f"rank {self.rank} of {self.size} ({self.host})"
            raise CommunicationError(f"{what} failed on {where}: {failed}") from failed
        if failed is not None:
            raise failed

    def _went_well(self, failed: Exception | None, confirmed: bool) -> bool:
        """Whether no rank was lost in a call that ended with `failed`, or well."""
        lost = self.has_lost() or _ulfm.is_loss(self._mpi, failed)
        if not confirmed:
            return not lost
        if lost or failed is not None:
            self.revoke()  # or the others wait in the call for this rank
        well = _ulfm.all_went_well(self._mpi, self._comm, not lost and failed is None)
        # A failure may be this rank's own, or come of values that a rank which died never sent.
        return well if failed is None or lost else not _ulfm.dead(self._comm)

    def _lost(self, what: str) -> RankLost:
        # Others may wait for this rank, which will not come, and need not have seen the death.
        self.revoke()
        dead = _ulfm.dead(self._comm)
        why = f"ranks {', '.join(map(str, dead))} died" if dead else "another rank says that one died"
        return RankLost(f"{what} failed on rank {self.rank} of {self.size} ({self.host}): {why}.")

    def has_lost(self) -> bool:
        """Whether this rank knows that a rank was lost. Not collective."""
        return self.loses_ranks and any(_ulfm.is_broken(comm) for comm in (self._comm, *self._private))

    def private_comm(self) -> int:
        """The address of an MPI_Comm that nobody else uses: a duplicate, whose calls return their errors. It
        is revoked and freed with this communicator. Collective."""
        comm = self._derive(self._comm)
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
        code = _ulfm.meet(self._mpi, self._comm, _GO_ON)
        if code != _GO_ON:  # a rank called `abort`, and has said why
            self._mpi.COMM_WORLD.Abort(code or 1)
        new = None
        while new is None:
            new = self._without_dead()
        new._owned += self._owned
        return new

    def _without_dead(self) -> MPICommunicator | None:
        """One attempt of `survivors`; None, on every rank that lives, if one more died meanwhile."""
        comm: Any = None
        try:
            comm = self._comm.Shrink()
        except self._mpi.Exception as error:
            if not _ulfm.is_loss(self._mpi, error):
                raise
        # Nobody has it before all have: to revoke one that another rank is still making crashes that rank.
        if not _ulfm.meet(self._mpi, self._comm, int(comm is not None)):
            return None
        self._owned.append(comm)
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        try:
            new = MPICommunicator(comm)
        except RankLost:
            new = None
        return new if _ulfm.meet(self._mpi, comm, int(new is not None)) else None

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
            self._wait(self._comm.Iallreduce(sent, result, self._ops[op]))
        return result

    def _wait(self, request: Any) -> None:
        """Waits for a collective call. Each round begins with one: here a rank that hangs is noticed."""
        deadline = time.monotonic() + self.stall_timeout_s
        while not request.Test():
            if time.monotonic() > deadline:
                self._abandoned = request  # it goes on to write to its memory
                self.barrier(_ROLL_CALL * self.stall_timeout_s)
                raise BarrierTimeout(
                    f"rank {self.rank} of {self.size} ({self.host}): an allreduce took more than "
                    f"{self.stall_timeout_s:g} s, though all ranks are there."
                )

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
        with self._errors("barrier", confirmed=False):
            if self.rank == 0:
                self._collect(deadline, timeout_s)
            else:
                self._report(deadline + timeout_s, timeout_s)

    def _collect(self, deadline: float, timeout_s: float) -> None:
        arrived = np.zeros(self.size, dtype=np.uint8)
        arrived[0] = 1
        pending = [self._comm.Irecv(arrived[r : r + 1], r, _ARRIVED) for r in range(1, self.size)]
        # Each one: Testall does not say that it was a death that failed it.
        _ulfm.wait(lambda: sum(not request.Test() for request in pending) == 0, deadline)
        for rank in np.flatnonzero(arrived[1:]) + 1:
            self._comm.Send(arrived, int(rank), _RELEASED)
        self._check(arrived, timeout_s)

    def _report(self, deadline: float, timeout_s: float) -> None:
        arrived = np.zeros(self.size, dtype=np.uint8)
        self._comm.Send(np.ones(1, dtype=np.uint8), 0, _ARRIVED)
        release = self._comm.Irecv(arrived, 0, _RELEASED)
        if not _ulfm.wait(release.Test, deadline):
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
        if self.loses_ranks:
            # MPI_Abort then ends this process alone and nobody is told. Where not all that live come to hear
            # of it in time, a death by a signal is at least seen.
            self.revoke()
            if _ulfm.meet(self._mpi, self._comm, code, time.monotonic() + _PARTING_S) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # MPICH's may return, and its launcher ends this process a moment later

    def close(self) -> None:
        for comm in self._owned:
            comm.Free()
        _mpi.stop(self._mpi)
