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
from hvd_train.errors import BarrierTimeout, CommunicationError

T = TypeVar("T")

_ARRIVED, _RELEASED = 1, 2
"""Message tags of `barrier`."""


class MPICommunicator(Communicator):
    """All ranks of MPI_COMM_WORLD, on a duplicate of it. Making one is collective; it initialises MPI."""

    def __init__(self) -> None:
        self._mpi = _mpi.load()
        _mpi.start(self._mpi)
        world = self._mpi.COMM_WORLD
        self._comm = world.Dup()
        self.name = "mpi"
        self.library = _mpi.library_version(self._mpi)
        self.rank, self.size = world.Get_rank(), world.Get_size()
        on_host = world.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = on_host.Get_rank(), on_host.Get_size()
        self.host = self._mpi.Get_processor_name()
        first_of_host = world.allgather(on_host.bcast(self.rank))
        on_host.Free()
        self.num_hosts = len(set(first_of_host))
        self._ops = {Op.SUM: self._mpi.SUM, Op.MIN: self._mpi.MIN, Op.MAX: self._mpi.MAX}

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._mpi.Exception as error:
            raise CommunicationError(
                f"{what} failed on rank {self.rank} of {self.size} ({self.host}): {error}"
            ) from error

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
        _wait(lambda: self._mpi.Request.Testall(pending), deadline)
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
        self._comm.Free()
        _mpi.stop(self._mpi)


def _wait(done: Any, deadline: float) -> bool:
    """Polls `done` until it holds or the deadline passes, backing off from spinning to 1 ms."""
    pause = 1e-6
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 1e-3)
    return True
