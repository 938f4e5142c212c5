"""What is compared: the ring, and each of its peers at its best."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvd_train.comm import _mpi, _mpi_t, horovod
from hvd_train.comm.base import Communicator, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.horovod import HorovodCommunicator
from hvd_train.errors import CommunicationError, EnvironmentMismatch
from hvd_train.tools.bench.allreduce.values import spread, weight

if TYPE_CHECKING:
    from hvd_train.comm.ring import RingCommunicator

OWN = "hvd_train average"
"""The setting of a backend of hvd_train that is not the ring: what choosing it would cost. It is no peer."""

CONTROL_VALUES = 64

_SEGMENT_BYTES = 1 << 20
"""Of Open MPI's segmented ring: what its own rules took for large messages while they chose it."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to combine a float32 tensor of each rank, ready to be called."""

    backend: str
    setting: str

    live: Tensor
    """float32 [numel]: the values of this rank, and the place of the result."""

    call: Callable[[], object]
    """What is timed. Collective."""

    outputs: Sequence[Callable[[], Tensor]]
    """Where the result must be after it."""

    mean: bool
    """Whether it is the weighted mean of the ranks, or else their sum."""

    ranks: Sequence[int]
    """Whose tensors are combined."""

    slack: float = 0.0
    """What a short type on the wire may change in an element."""

    sent: Callable[[], int] = lambda: 0
    """Bytes that this rank has sent to other hosts so far, where that is counted."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One way to sum a few doubles."""

    backend: str
    setting: str
    call: Callable[[], np.ndarray]
    expected: np.ndarray

    def check(self, result: np.ndarray) -> None:
        """Raises `CommunicationError` unless this is the sum."""
        if not np.array_equal(result, self.expected):
            raise CommunicationError(
                f"{self.backend} ({self.setting}): the sum is {result}; expected {self.expected}."
            )


class Peer(ABC):
    """A backend. Making one is not collective, and raises `EnvironmentMismatch` where the backend cannot be
    used on this rank. All else is collective.

    `library` describes, after `open`, what it is and how it is set.
    """

    name: str
    library: str

    blocks = False
    """Whether it must be open only while it is measured, as it takes time from whatever else runs."""

    def open(self) -> None:  # noqa: B027  most have nothing to open
        """Makes what all sizes share. Raises `EnvironmentMismatch`, on every rank, if it cannot be."""

    def close(self) -> None:  # noqa: B027
        """The reverse."""

    @abstractmethod
    def contestants(self, private: Tensor) -> list[Contestant]:
        """Its ways to combine tensors of the shape of `private`, which they may share: it is written anew
        before each call."""

    def controls(self) -> list[Control]:
        """Its ways to sum `CONTROL_VALUES` doubles, where that is compared."""
        return []


def meet(comm: Communicator) -> None:
    """Returns when all ranks have called it. Collective."""
    # No rank has the sum before every rank has called; barriers of some backends sleep between polls.
    comm.allreduce(np.zeros(1), Op.SUM)


def averaging(comm: Communicator, numel: int, backend: str, setting: str) -> Contestant:
    """`comm.average` on a buffer of its own, with a weight that differs by rank. Collective."""
    buffer: Buffer = comm.buffer(numel, torch.float32)
    mine = weight(comm.rank)
    return Contestant(
        backend=backend,
        setting=setting,
        live=buffer.live,
        call=lambda: comm.average(buffer, mine),
        outputs=(lambda: buffer.live, lambda: buffer.anchor),
        mean=True,
        ranks=range(comm.size),
    )


def summing(
    comm: Communicator, backend: str, setting: str, live: Tensor, call: Callable[[], object]
) -> Contestant:
    """A sum over all ranks, in place in `live`."""
    ranks = range(comm.size)
    return Contestant(
        backend=backend,
        setting=setting,
        live=live,
        call=call,
        outputs=(lambda: live,),
        mean=False,
        ranks=ranks,
    )


def _control_values(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
    """The values of this rank, and the sum."""
    values = np.arange(CONTROL_VALUES, dtype=np.float64)
    return values + comm.rank, comm.size * values + sum(range(comm.size))


def _control(comm: Communicator, backend: str) -> Control:
    mine, total = _control_values(comm)
    return Control(
        backend=backend,
        setting="hvd_train allreduce",
        call=lambda: comm.allreduce(mine, Op.SUM),
        expected=total,
    )


class RingPeer(Peer):
    """The backend `ring`; it writes the anchor too, which the others do not.

    Args:
        inner: connects the ranks.
        wire: what carries an element between hosts.
    """

    name = "ring"
    comm: RingCommunicator

    def __init__(self, inner: Communicator, wire: str) -> None:
        from hvd_train.comm import ring

        self._make: Callable[[], RingCommunicator] = lambda: ring.RingCommunicator(inner, wire)
        self._short = wire != "float32"

    def open(self) -> None:
        self.comm = self._make()
        self.library = self.comm.library

    def contestants(self, private: Tensor) -> list[Contestant]:
        comm = self.comm
        # Each hop may err by half a step of int8, the coarsest: 1/254 of the largest difference.
        slack = comm.num_hosts * spread(comm.size) / 127 if self._short else 0.0
        one = averaging(comm, private.numel(), self.name, "average")
        return [replace(one, slack=slack, sent=lambda: comm.payload_bytes)]

    def controls(self) -> list[Control]:
        return [_control(self.comm, self.name)]


class MPIPeer(Peer):
    """MPI_Allreduce in place, as MPI has it and, under Open MPI, by its segmented ring.

    Args:
        comm: the backend `mpi` of this job.
    """

    name = "mpi"

    def __init__(self, comm: Communicator) -> None:
        if comm.name != self.name:
            raise EnvironmentMismatch(f"{comm.library} started this job: there is no MPI in it")
        self._comm = comm
        self._mpi = _mpi.load()
        self._settings: dict[str, Any] = {}

    def open(self) -> None:
        self._settings["MPI_Allreduce, default"] = self._mpi.COMM_WORLD.Dup()
        if self._segment():
            self._settings["MPI_Allreduce, segmented ring"] = self._mpi.COMM_WORLD.Dup()
            self.library = f"{self._comm.library}; segments of {_SEGMENT_BYTES >> 10} KiB"
        else:
            self.library = f"{self._comm.library}; it offers no other algorithm"
        self._forget()

    def _segment(self) -> bool:
        # Read when a communicator is made: that which is made next has them, the others stay as they are.
        wanted = {
            "coll_tuned_use_dynamic_rules": 1,
            "coll_tuned_allreduce_algorithm": 5,
            "coll_tuned_allreduce_algorithm_segmentsize": _SEGMENT_BYTES,
        }
        self._before = {name: _mpi_t.read(self._mpi, name) for name in wanted}
        taken = all(_mpi_t.write(self._mpi, name, value) for name, value in wanted.items())
        return all(self._comm.allgather(taken))

    def _forget(self) -> None:
        for name, value in self._before.items():
            if value is not None:
                _mpi_t.write(self._mpi, name, value)

    def close(self) -> None:
        for comm in self._settings.values():
            comm.Free()

    def contestants(self, private: Tensor) -> list[Contestant]:
        array = private.numpy()

        def call(of: Any) -> Callable[[], object]:
            return lambda: of.Allreduce(self._mpi.IN_PLACE, array, self._mpi.SUM)

        found = [summing(self._comm, self.name, s, private, call(c)) for s, c in self._settings.items()]
        return [*found, averaging(self._comm, private.numel(), self.name, OWN)]

    def controls(self) -> list[Control]:
        mine, total = _control_values(self._comm)
        received = np.empty_like(mine)
        plain = next(iter(self._settings.values()))

        def call() -> np.ndarray:
            plain.Allreduce(mine, received, self._mpi.SUM)
            return received

        return [
            Control(backend=self.name, setting="MPI_Allreduce, default", call=call, expected=total),
            _control(self._comm, self.name),
        ]


class HorovodPeer(Peer):
    """Horovod's allreduce in place, with the cycle time that `horovod.load` asks for.

    Args:
        comm: the communicator of this job. If that is Horovod's, Horovod runs all the time.
    """

    name = "horovod"

    def __init__(self, comm: Communicator) -> None:
        # Its thread calls MPI, ours does not while it runs; Horovod would warn of that each time.
        os.environ.setdefault("HOROVOD_LOG_LEVEL", "error")
        self._hvd = horovod.load()
        self._shared = comm if comm.name == self.name else None
        self.blocks = self._shared is None

    def open(self) -> None:
        self.comm = self._shared or HorovodCommunicator()
        beside = "" if self.blocks else "; its thread runs beside the others' calls"
        self.library = f"{self.comm.library}; cycle time {os.environ['HOROVOD_CYCLE_TIME']} ms{beside}"

    def close(self) -> None:
        if self._shared is None:
            self.comm.close()

    def contestants(self, private: Tensor) -> list[Contestant]:
        name = f"bench.{private.numel()}"

        def call() -> object:
            return self._hvd.allreduce_(private, op=self._hvd.Sum, name=name)

        return [
            summing(self.comm, self.name, "allreduce_", private, call),
            averaging(self.comm, private.numel(), self.name, OWN),
        ]
