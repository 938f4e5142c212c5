"""Averaging by MPI's own collectives, through mpi4py, on the flat buffers. Nothing to compile."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from torch import Tensor

from hvd_train.comm import _mpi, _ulfm
from hvd_train.comm.base import Communicator, OnSlice, Op
from hvd_train.comm.buffer import Buffer, slice_bounds
from hvd_train.comm.phases import average_in_phases
from hvd_train.environment.launcher import require_way_in
from hvd_train.errors import BarrierTimeout, CommunicationError, RankLost
from hvd_train.liveness import Liveness

T = TypeVar("T")

_ARRIVED, _RELEASED = 1, 2
"""Message tags of `barrier`."""

_GO_ON = -1
"""What a rank that does not give up brings to the agreement with those that do: neutral under "and"."""

_FIND_MISSING = 0.1
"""Time in which ranks that gave up find the missing ones, as a fraction of the time that they waited."""

_ABORT_WAIT_S = 30.0
"""How long a rank that gives up waits for the others, which may be in their local steps."""

_PIECE = 1 << 30
"""Bytes of one message: many MPI libraries count in 32 bits."""

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class MPICommunicator(Communicator):
    """All ranks of MPI_COMM_WORLD, on a duplicate of it. Making one is collective; it initialises MPI.

    Raises `LauncherMismatch` where it is certain that MPI would see a world of size 1.

    Args:
        liveness: how long to wait for other ranks; by default as `Liveness` says.
        comm: a communicator of mpi4py to use, and to own, instead: the surviving ranks of a world.
    """

    def __init__(self, liveness: Liveness | None = None, comm: Any = None) -> None:
        super().__init__(liveness)
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
        """Freed at the end, and not before: Open MPI crashes if a communicator is made while the message that
        one of the same number was revoked is still under way."""
        self._private: list[Any] = []
        self._ops = {Op.SUM: self._mpi.SUM, Op.MIN: self._mpi.MIN, Op.MAX: self._mpi.MAX}
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        if comm is None:
            _mpi.meet_at_end(lambda: self._duplicate(world))
            self._comm = self._derive(world)
        # Not by MPI_Comm_split_type, which waits without a deadline. Hosts may have the same name.
        hosts = self.allgather((self.host, _boot_id()))
        members = [r for r, host in enumerate(hosts) if host == hosts[self.rank]]
        self.local_rank, self.local_size = members.index(self.rank), len(members)
        self.num_hosts = len(set(hosts))
        self._closing = self._derive(self._comm)
        """For the last barrier, so that no other call can match it: ranks may end too early."""

    def _derive(self, parent: Any) -> Any:
        """A duplicate of `parent`, which ends with this communicator. Collective."""
        comm = self._duplicate(parent)
        self._owned.append(comm)
        return comm

    def _duplicate(self, parent: Any) -> Any:
        with self.liveness, self._errors("duplicating the communicator"):
            comm, request = parent.Idup()
            self._wait(request, comm)
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        return comm

    @contextmanager
    def _errors(self, what: str, confirmed: bool = True) -> Iterator[None]:
        """Translates failures of an MPI call to the errors of this package. Where ranks can be lost, and the
        call is to be `confirmed`, it is collective: no rank continues before the call went well on all."""
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        stalled = confirmed and isinstance(failed, BarrierTimeout)  # so would be an agreement
        if self.loses_ranks and not stalled and not self._went_well(failed, confirmed):
            raise self._lost(what) from failed
        if isinstance(failed, self._mpi.Exception):
            raise CommunicationError(f"{what} failed on {self.where}: {failed}") from failed
        if failed is not None:
            raise failed

    def _went_well(self, failed: Exception | None, confirmed: bool) -> bool:
        """Whether no rank was lost in a call that ended with `failed`, or well."""
        lost = self.has_lost() or _ulfm.is_loss(self._mpi, failed)
        if not confirmed:
            return not lost
        if lost or failed is not None:
            self.revoke()  # or the others wait in the call for this rank
        mine = not lost and failed is None
        well = _ulfm.all_went_well(self._mpi, self._comm, mine, self.liveness.give_up)
        if well is None:
            raise self.liveness.error(self.where)
        # A failure may be this rank's own, or come of values that a rank which died never sent.
        return well if failed is None or lost else not _ulfm.dead(self._comm)

    def _lost(self, what: str) -> RankLost:
        # Others may wait for this rank, which will not arrive, and may not have seen the death.
        self.revoke()
        dead = _ulfm.dead(self._comm)
        why = f"ranks {', '.join(map(str, dead))} died" if dead else "another rank reports that one died"
        return RankLost(f"{what} failed on {self.where}: {why}.")

    def has_lost(self) -> bool:
        return self.loses_ranks and any(_ulfm.is_broken(comm) for comm in (self._comm, *self._private))

    def mpi_comm(self) -> int:
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
        code = self._meet(self._comm, _GO_ON)
        if code != _GO_ON:  # a rank called `abort`, and has said why
            self._mpi.COMM_WORLD.Abort(code or 1)
        new = None
        while new is None:
            new = self._without_dead()
        new._owned += self._owned
        return new

    def _meet(self, comm: Any, value: int) -> int:
        """`_ulfm.meet`, for as long as the surviving ranks may take."""
        met = _ulfm.meet(self._mpi, comm, value, self.liveness.give_up)
        if met is None:
            raise self.liveness.error(self.where)
        return met

    def _without_dead(self) -> MPICommunicator | None:
        """One attempt of `survivors`; None, on every surviving rank, if one more died meanwhile."""
        comm: Any = None
        try:
            comm = self._comm.Shrink()
        except self._mpi.Exception as error:
            if not _ulfm.is_loss(self._mpi, error):
                raise
        # No rank uses it before all have it: revoking one that another rank still makes crashes that rank.
        if not self._meet(self._comm, int(comm is not None)):
            return None
        self._owned.append(comm)
        comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        try:
            new = MPICommunicator(self.liveness.of_survivors(), comm)
        except RankLost:
            new = None
        return new if self._meet(comm, int(new is not None)) else None

    def _counts(self, numel: int) -> list[int]:
        bounds = (slice_bounds(numel, self.size, r) for r in range(self.size))
        return [stop - start for start, stop in bounds]

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        with self.liveness.call(buffer.num_bytes):
            return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        sent, received = staged.numpy(), owned.numpy()
        with self._errors("reduce-scatter"):
            counts = self._counts(staged.numel())
            self._wait(self._comm.Ireduce_scatter(sent, received, counts, self._mpi.SUM), sent, received)

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        sent, received = owned.numpy(), staged.numpy()
        with self._errors("all-gather"):
            counts = self._counts(staged.numel())
            self._wait(self._comm.Iallgatherv(sent, (received, counts)), sent, received)

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        sent = np.ascontiguousarray(values, dtype=np.float64)
        result = np.empty_like(sent)
        with self.liveness, self._errors("allreduce"):
            self._wait(self._comm.Iallreduce(sent, result, self._ops[op]), sent, result)
        return result

    def _wait(self, request: Any, *memory: Any) -> None:
        """Waits for a call that does not block, which uses `memory`. Every wait of this backend but that of a
        barrier with a time of its own is here, so that each ends."""
        if _ulfm.wait(request.Test, self.liveness.give_up):
            return
        _ulfm.abandon(request, *memory)
        raise self.liveness.error(self.where, self._find_missing())

    def _find_missing(self) -> dict[int, str]:
        """The ranks that do not arrive, where no signs are seen. Called by ranks that gave up."""
        if self.liveness.sees_signs:
            return {}
        try:
            self.barrier(_FIND_MISSING * self.liveness.stall_timeout_s)
        except BarrierTimeout as error:
            return dict.fromkeys(error.missing, "")
        return {}

    def broadcast(self, value: T, root: int = 0) -> T:
        content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL) if self.rank == root else b""
        length = np.array([len(content)], dtype=np.int64)
        with self.liveness, self._errors("broadcast"):
            self._wait(self._comm.Ibcast(length, root), length)
            received = np.empty(int(length[0]), dtype=np.uint8)
            if self.rank == root:
                received = np.frombuffer(content, dtype=np.uint8)
            for start in range(0, len(received), _PIECE):
                piece = received[start : start + _PIECE]
                self._wait(self._comm.Ibcast([piece, self._mpi.BYTE], root), piece)
        return value if self.rank == root else pickle.loads(received.data)

    def allgather(self, value: T) -> list[T]:
        content = np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), dtype=np.uint8)
        length = np.array([len(content)], dtype=np.int64)
        lengths = np.zeros(self.size, dtype=np.int64)
        with self.liveness, self._errors("all-gather of values"):
            self._wait(self._comm.Iallgather(length, lengths), length, lengths)
            received = np.empty(int(lengths.sum()), dtype=np.uint8)
            self._wait(
                self._comm.Iallgatherv(
                    [content, self._mpi.BYTE], [received, lengths.tolist(), self._mpi.BYTE]
                ),
                content,
                received,
            )
        stops = np.cumsum(lengths)
        return [pickle.loads(received[stop - n : stop].data) for n, stop in zip(lengths, stops, strict=True)]

    def barrier(self, timeout_s: float | None = None) -> None:
        if timeout_s is None:
            with self.liveness, self._errors("barrier"):
                self._wait(self._comm.Ibarrier())
            return
        # MPI's barrier cannot report who is missing. Here each rank reports to rank 0, which tells them who
        # did not arrive; the others wait twice as long, so that its answer arrives before they give up.
        with self.liveness, self._errors("barrier", confirmed=False):
            if self.rank == 0:
                self._collect(timeout_s)
            else:
                self._report(timeout_s)

    def _collect(self, timeout_s: float) -> None:
        arrived = np.zeros(self.size, dtype=np.uint8)
        arrived[0] = 1
        calls = [self._comm.Irecv(arrived[r : r + 1], r, _ARRIVED) for r in range(1, self.size)]
        self._all_done(calls, timeout_s, arrived)
        answer = arrived.copy()  # one that comes later counts as missing
        came = np.flatnonzero(answer[1:]) + 1
        self._all_done([self._comm.Isend(answer, int(r), _RELEASED) for r in came], timeout_s, answer)
        self._check(answer, timeout_s)

    def _report(self, timeout_s: float) -> None:
        one, arrived = np.ones(1, dtype=np.uint8), np.zeros(self.size, dtype=np.uint8)
        calls = [self._comm.Isend(one, 0, _ARRIVED), self._comm.Irecv(arrived, 0, _RELEASED)]
        if not self._all_done(calls, 2 * timeout_s, one, arrived):
            raise BarrierTimeout(f"rank 0 did not arrive at the barrier within {timeout_s:g} s.", missing=[0])
        self._check(arrived, timeout_s)

    def _all_done(self, requests: Sequence[Any], timeout_s: float, *memory: Any) -> bool:
        """Whether messages have come, or gone, within a time; `memory` is what they use."""
        # Each one: Testall does not say that it was a death that failed it.
        if _ulfm.wait(
            lambda: sum(not request.Test() for request in requests) == 0,
            lambda waited_s: waited_s > timeout_s,
        ):
            return True
        _ulfm.abandon(requests, *memory)
        return False

    def _check(self, arrived: np.ndarray, timeout_s: float) -> None:
        missing = [int(r) for r in np.flatnonzero(arrived == 0)]
        if missing:
            names = ", ".join(map(str, missing))
            raise BarrierTimeout(
                f"ranks {names} did not arrive at the barrier within {timeout_s:g} s.", missing
            )

    def _abort(self, code: int) -> NoReturn:
        if self.loses_ranks:
            # MPI_Abort then ends this process only and informs no rank. Where not all survivors learn of it
            # in time, a death by a signal is at least detected.
            self.revoke()
            patience = _ABORT_WAIT_S
            if _ulfm.meet(self._mpi, self._comm, code, lambda waited_s: waited_s > patience) is None:
                os.kill(os.getpid(), signal.SIGKILL)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # MPICH's may return, and its launcher ends this process a moment later

    def close(self) -> None:
        if not self.has_lost():
            # The end of the process, which finalises MPI, has no deadline.
            with self.liveness, self._errors("closing", confirmed=False):
                self._wait(self._closing.Ibarrier())
        self.liveness.stop_sharing()
        for comm in self._owned:
            comm.Free()


def _boot_id() -> str:
    """What tells apart hosts of the same name; empty where the kernel does not say."""
    try:
        return Path(_BOOT_ID).read_text()
    except OSError:
        return ""
