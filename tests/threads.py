"""A world of several ranks in one process, each of them a thread: for tests that need ranks but no MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from hvd_train.comm.base import Communicator, OnSlice, Op, Pending
from hvd_train.comm.buffer import Buffer, slice_bounds
from hvd_train.comm.phases import agree_on_shares, average_in_phases
from hvd_train.errors import BarrierTimeout, RankLost
from tests.deadlines import calibration

T = TypeVar("T")

DEADLINE_S = 30.0 * calibration()
"""How long a rank waits for the others: only a test that fails waits for so long."""


class World:
    """Where the ranks meet. Once one of them has failed, nobody meets here any more.

    Unlike `threading.Barrier`, a meeting that all ranks reached is one for all of them, even if the first to
    leave it fails before the last has woken up.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Any] = [None] * size
        self._changed = threading.Condition()
        self._arrivals = 0
        self._failed = False

    def meet(self, rank: int, value: Any, read: Callable[[list[Any]], T]) -> T:
        """What `read` makes of the values of all ranks; they stay as they are until all have read."""
        self._values[rank] = value
        self.wait(DEADLINE_S)
        result = read(self._values)
        self.wait(DEADLINE_S)
        return result

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            enough = (self._arrivals // self.size + 1) * self.size
            self._arrivals += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._arrivals >= enough or self._failed, timeout_s)
            if self._arrivals < enough:
                raise RankLost("a rank of this world failed, or did not come in time")

    def leave(self) -> None:
        """Of a rank that failed: the others find out when they wait for it."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


@final
class ThreadCommunicator(Communicator):
    """One rank of a `World`. Sums are taken in the order of the ranks. Averages that are started in the
    background are complete in `wait`; until then nothing else may be called."""

    def __init__(self, world: World, rank: int) -> None:
        super().__init__()
        self.name, self.library = "threads", "shared memory of one process"
        self.rank, self.size = rank, world.size
        self.local_rank, self.local_size = rank, world.size
        self.host, self.num_hosts = "here", 1
        self._world = world
        self.pending: Pending | None = None
        """The average in the background that has not ended."""

    def _meet(self, value: Any, read: Callable[[list[Any]], T]) -> T:
        assert self.pending is None, "an average is pending"
        return self._world.meet(self.rank, value, read)

    def start_average(
        self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None, *, staged: bool = False
    ) -> Pending:
        """See `Communicator.start_average`."""
        values = self.staging(buffer)
        if not staged:
            values.copy_(buffer.live)
        shares = agree_on_shares(self, buffer, weight)
        self.pending = _Later(self, buffer, values, None if shares is None else shares[self.rank], on_slice)
        return self.pending

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        start, stop = slice_bounds(staged.numel(), self.size, self.rank)

        def add(parts: list[Tensor]) -> None:
            owned.zero_()
            for part in parts:
                owned.add_(part[start:stop])

        self._meet(staged, add)

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        def collect(parts: list[Tensor]) -> None:
            for rank, part in enumerate(parts):
                start, stop = slice_bounds(staged.numel(), self.size, rank)
                staged[start:stop] = part

        self._meet(owned, collect)

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        reduce = {Op.SUM: np.sum, Op.MIN: np.min, Op.MAX: np.max}[op]
        sent = np.array(values, dtype=np.float64)
        return self._meet(sent, lambda parts: np.asarray(reduce(np.stack(parts), axis=0)))

    def broadcast(self, value: T, root: int = 0) -> T:
        return self.allgather(value)[root]

    def allgather(self, value: T) -> list[T]:
        return self._meet(value, list)

    def barrier(self, timeout_s: float | None = None) -> None:
        try:
            self._world.wait(DEADLINE_S if timeout_s is None else timeout_s)
        except RankLost as error:
            raise BarrierTimeout(str(error)) from None

    def _abort(self, code: int) -> NoReturn:
        self._world.leave()
        raise SystemExit(code)

    def close(self) -> None:
        return


@final
class _Later(Pending):
    """An average whose ranks have agreed on the shares."""

    def __init__(
        self,
        comm: ThreadCommunicator,
        buffer: Buffer,
        staged: Tensor,
        share: float | None,
        on_slice: OnSlice | None,
    ) -> None:
        self.staged = staged
        self._comm, self._buffer, self._share, self._on_slice = comm, buffer, share, on_slice

    def test(self) -> bool:
        return True

    def wait(self) -> bool:
        self._comm.pending = None
        if self._share is None:
            return False
        buffer = self._buffer
        scaled = torch.zeros(buffer.numel, dtype=buffer.wide)
        if self._share:
            scaled.add_(self.staged, alpha=self._share)
        self._comm.reduce_scatter(scaled, buffer.owned)
        if self._on_slice is not None:
            self._on_slice(buffer.owned, buffer.start)
        self._comm.all_gather(buffer.owned, scaled)
        buffer.previous.copy_(scaled)
        buffer.advance()
        return True


def outcomes(size: int, program: Callable[[ThreadCommunicator], T]) -> list[T | BaseException]:
    """Runs `program` on every rank of a new world: what each returned, or the exception that ended it."""
    world = World(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = program(ThreadCommunicator(world, rank))
        except BaseException as error:
            results[rank] = error
            world.leave()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


def on_ranks(size: int, program: Callable[[ThreadCommunicator], T]) -> list[T]:
    """What `program` returns on every rank of a new world. Raises the exception of the first rank that has
    one of its own."""
    results = outcomes(size, program)
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        raise next((e for e in errors if not isinstance(e, RankLost)), errors[0])
    return results  # type: ignore[return-value]
