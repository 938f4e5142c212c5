"""A world of one rank: the same interface, nothing to send."""

from __future__ import annotations

import os
import socket
from typing import NoReturn, TypeVar

import numpy as np
from torch import Tensor

from hvd_train.comm.base import Communicator, OnSlice, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.phases import average_in_phases
from hvd_train.liveness import Liveness

T = TypeVar("T")


class SoloCommunicator(Communicator):
    """One process, no MPI. The average of one rank is its own state."""

    def __init__(self, liveness: Liveness | None = None) -> None:
        super().__init__(liveness)
        self.name = "solo"
        self.library = "no message passing"
        self.rank, self.size = 0, 1
        self.local_rank, self.local_size = 0, 1
        self.host = socket.gethostname()
        self.num_hosts = 1

    @property
    def payload_bytes(self) -> int:
        """None are sent."""
        return 0

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        owned.copy_(staged)

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        staged.copy_(owned)

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        return np.array(values, dtype=np.float64)

    def broadcast(self, value: T, root: int = 0) -> T:
        return value

    def allgather(self, value: T) -> list[T]:
        return [value]

    def barrier(self, timeout_s: float | None = None) -> None:
        return

    def _abort(self, code: int) -> NoReturn:
        os._exit(code)

    def close(self) -> None:
        return
