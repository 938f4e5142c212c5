"""Averaging by Horovod: for horovodrun over Gloo, where there is no MPI, or on request.

One tensor a call and each call waited for, so that nothing is fused by timing and the order of every sum
is fixed.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from hvd_train.comm import _mpi
from hvd_train.comm.base import Communicator, OnSlice, Op
from hvd_train.comm.buffer import Buffer, slice_bounds
from hvd_train.comm.phases import average_in_phases
from hvd_train.errors import BarrierTimeout, EnvironmentMismatch, RankLost
from hvd_train.liveness import Liveness

T = TypeVar("T")

_PAUSE_S = 1e-4
"""Seconds between two polls of a call."""


def load() -> Any:
    """The module horovod.torch. Raises `EnvironmentMismatch` if it is missing or does not load."""
    # Horovod checks for work every cycle; a round has a handful of short dependent calls, and at the
    # default of 1 ms each would wait for half a cycle.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
    try:
        import horovod.torch as hvd
    except Exception as error:
        raise EnvironmentMismatch(
            f"Horovod cannot be used: {error}. Expected Horovod built for torch {torch.__version__}: run "
            "`make setup`, or choose another backend (`--backend mpi`, started by mpirun)."
        ) from None
    return hvd


class HorovodCommunicator(Communicator):
    """All ranks that Horovod sees. Making one is collective; it calls hvd.init()."""

    def __init__(self, liveness: Liveness | None = None) -> None:
        super().__init__(liveness)
        self._hvd = load()
        mpi_is_up = _mpi.is_up()
        self._hvd.init()
        self._owns_mpi = self._hvd.mpi_enabled() and not mpi_is_up
        """Whether Horovod has initialised MPI, and finalises it when it is shut down."""
        self.name = "horovod"
        self.library = f"Horovod {_version()} over {self._transport()}"
        self.rank, self.size = self._hvd.rank(), self._hvd.size()
        self.local_rank, self.local_size = self._hvd.local_rank(), self._hvd.local_size()
        self.host = socket.gethostname()
        self.num_hosts = int(self.allreduce(np.array([float(self.local_rank == 0)]), Op.SUM)[0])

    def _transport(self) -> str:
        return "MPI" if self._hvd.mpi_enabled() else "Gloo"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._hvd.HorovodInternalError as error:
            raise RankLost(f"{what} failed on {self.where}: {error}") from error

    def _wait(self, what: str, handle: int) -> Any:
        """The result of a call that does not block. Every wait of this backend is here, so that each has a
        deadline."""
        with self._errors(what):
            began = time.monotonic()
            while not self._hvd.poll(handle):
                if self.liveness.give_up(time.monotonic() - began):
                    raise self.liveness.error(self.where)
                time.sleep(_PAUSE_S)
            return self._hvd.synchronize(handle)

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        with self.liveness.call(buffer.num_bytes):
            return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        # Not by hvd.reducescatter: gloo's moves its result within the buffer that it still sends from, and
        # sums were seen to be wrong where a receiver is slow. An all-to-all sends as little.
        if staged.numel() == 0:
            return
        bounds = (slice_bounds(staged.numel(), self.size, r) for r in range(self.size))
        counts = torch.tensor([stop - start for start, stop in bounds], dtype=torch.int32)
        handle = self._hvd.alltoall_async(staged, counts, name=_name("reduce_scatter", staged))
        received, _ = self._wait("reduce-scatter", handle)
        torch.sum(received.view(self.size, owned.numel()), 0, out=owned)

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        if staged.numel() == 0:
            return
        handle = self._hvd.allgather_async(owned, name=_name("all_gather", staged))
        staged.copy_(self._wait("all-gather", handle))

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        sent = torch.from_numpy(np.array(values, dtype=np.float64))
        ops = {Op.SUM: self._hvd.Sum, Op.MIN: self._hvd.Min, Op.MAX: self._hvd.Max}
        with self.liveness:
            handle = self._hvd.allreduce_async(sent, op=ops[op], name=_name(f"allreduce_{op.value}", sent))
            received: Tensor = self._wait("allreduce", handle)
        return np.asarray(received.numpy())

    def broadcast(self, value: T, root: int = 0) -> T:
        content = _packed(value if self.rank == root else None)
        with self.liveness:
            length = torch.tensor([len(content)])
            handle = self._hvd.broadcast_async(length, root, name="hvd_train.broadcast.length")
            num_bytes = int(self._wait("broadcast", handle)[0])
            if self.rank != root:
                content = torch.empty(num_bytes, dtype=torch.uint8)
            handle = self._hvd.broadcast_async(content, root, name="hvd_train.broadcast.content")
            received = self._wait("broadcast", handle)
        return value if self.rank == root else _unpacked(received)

    def allgather(self, value: T) -> list[T]:
        content = _packed(value)
        with self.liveness:
            length = torch.tensor([len(content)])
            handle = self._hvd.allgather_async(length, name="hvd_train.allgather.length")
            lengths = self._wait("all-gather of values", handle).tolist()
            handle = self._hvd.allgather_async(content, name="hvd_train.allgather.content")
            received = self._wait("all-gather of values", handle)
        return [_unpacked(piece) for piece in received.split(lengths)]

    def barrier(self, timeout_s: float | None = None) -> None:
        with self.liveness:
            handle = self._hvd.allreduce_async(torch.zeros(1), op=self._hvd.Sum, name="hvd_train.barrier")
            if timeout_s is not None:
                self._wait_at_most(handle, timeout_s)
            self._wait("barrier", handle)

    def _wait_at_most(self, handle: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._errors("barrier"):
            while not self._hvd.poll(handle):
                if time.monotonic() > deadline:
                    raise BarrierTimeout(
                        f"some ranks did not arrive at the barrier within {timeout_s:g} s. Horovod's own log "
                        "names them after HOROVOD_STALL_CHECK_TIME_SECONDS (60)."
                    )
                time.sleep(_PAUSE_S)

    def _abort(self, code: int) -> NoReturn:
        # The launcher, horovodrun or mpirun, ends the others when one process ends with a code that is not 0.
        os._exit(code)

    def close(self) -> None:
        # Horovod shuts down on all ranks together, and has no deadline for that.
        with self.liveness:
            handle = self._hvd.allreduce_async(torch.zeros(1), op=self._hvd.Sum, name="hvd_train.close")
            self._wait("closing", handle)
        self.liveness.stop_sharing()
        if not self._owns_mpi:  # it would finalise MPI, which cannot be started again
            self._hvd.shutdown()


def _packed(value: object) -> Tensor:
    """A value as bytes, uint8."""
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpacked(content: Tensor) -> Any:
    return pickle.loads(content.numpy().tobytes())


def _name(operation: str, tensor: Tensor) -> str:
    """Horovod matches the calls of the ranks by name and caches by name what it agreed on."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"hvd_train.{operation}.{kind}.{'x'.join(map(str, tensor.shape))}"


def _version() -> str:
    import horovod

    return str(horovod.__version__)
