"""What a communicator is: the one interface between the algorithm and whatever moves the bytes."""

from __future__ import annotations

import enum
import secrets
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from hvd_train.comm import ending
from hvd_train.comm.buffer import Buffer, slice_bounds
from hvd_train.comm.slice_state import SliceState, deal
from hvd_train.errors import CommunicationError, UserError
from hvd_train.liveness import Liveness

T = TypeVar("T")
OnSlice = Callable[[Tensor, int], None]

_GRACE_S = 3.0
"""Seconds that a rank which lost contact gives the one at fault to report it."""

_PIECE_ELEMENTS = 1 << 21
"""Elements of which a message has the kept values: MPI counts its bytes in 31 bits."""

_READING_S = 0.5
"""Seconds for the launcher to read a rank's last output: MPICH's ends all ranks without reading the rest."""


class Op(enum.Enum):
    """What `Communicator.allreduce` does with the values of all ranks."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


class Pending(ABC):
    """An average that was started and goes on while the rank does something else.

    `staged` is what is averaged: `Communicator.staging` of the buffer. Until `wait` has returned no other
    method of the communicator may be called.
    """

    staged: Tensor

    @abstractmethod
    def test(self) -> bool:
        """Whether `wait` would return, or call the slice step, at once. Not collective; does not wait."""

    @abstractmethod
    def wait(self) -> bool:
        """Ends the average: anchor := the weighted mean of all ranks' `staged`; live stays as it is. Returns
        whether there was any weight. Collective; raises what `Communicator.average` raises, and what the
        slice step raises. In both cases the average is over, and the anchor stays."""


class _Done(Pending):
    """An average of a backend that does all of it when it is started."""

    def __init__(self, staged: Tensor, any_weight: bool) -> None:
        self.staged = staged
        self._any_weight = any_weight

    def test(self) -> bool:
        return True

    def wait(self) -> bool:
        return self._any_weight


class Communicator(ABC):
    """The ranks of one job. Every method is collective unless it says otherwise: all ranks call the same
    methods in the same order, from one thread.

    `rank`, `size`, `local_rank`, `local_size`, `host` (its name) and `num_hosts` are plain values, fixed
    when the communicator is made. `name` is the backend's, `library` says what moves the bytes,
    `loses_ranks` whether the surviving ranks can continue by `survivors` after a `RankLost`,
    `averages_in_background` whether messages of `start_average` travel while the rank does something else.

    No method waits for ever: a rank that waits for one that makes no progress raises `BarrierTimeout`, which
    names it, as `liveness` says.

    Args:
        liveness: how long to wait for other ranks; by default as `Liveness` says.
    """

    name: str
    library: str
    loses_ranks: bool = False
    averages_in_background: bool = False
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    num_hosts: int

    def __init__(self, liveness: Liveness | None = None) -> None:
        self.liveness = Liveness() if liveness is None else liveness

    @property
    def payload_bytes(self) -> int | None:
        """Bytes that this rank has handed to the network in averages so far; None where the library under
        the backend does not tell. Not collective."""
        return None

    @property
    def where(self) -> str:
        """This rank, in words."""
        return f"rank {self.rank} of {self.size} ({self.host})"

    def share_signs(self, folder: Path | None) -> None:
        """Lets the ranks see each other's signs of life, where all of them see `folder`, that of rank 0, or
        are on one host. Collective."""
        if self.num_hosts == 1:
            folder = Path(tempfile.gettempdir())
        token, place = self.broadcast((secrets.token_hex(8), folder and folder.resolve()))
        self.liveness.share(self.rank, self.allgather(self.host), place, token)
        self.barrier()
        if not all(self.allgather(self.liveness.sees_all())):
            self.liveness.stop_sharing()

    def buffer(self, numel: int, dtype: torch.dtype) -> Buffer:
        """A buffer of `numel` elements of `dtype`, zeros, placed where this backend averages fastest.

        Raises `TypeError` for a type that is not in `DTYPES`.
        """
        return Buffer.private(numel, dtype, self.size, self.rank)

    def owned(self, numel: int) -> tuple[int, int]:
        """[start, stop) of the slice that this rank owns of a buffer of `numel` elements. Not collective."""
        return slice_bounds(numel, self.size, self.rank)

    def keep_state(self, buffer: Buffer, num_values: int) -> None:
        """Gives the slice step of `buffer` memory for `num_values` values of each element, zeros: see
        `Buffer.state`. Collective.

        Raises `MemoryError`, on every rank, where ranks share memory and a host has not enough.
        """
        buffer.kept = SliceState.private(num_values, buffer.wide, (buffer.start, buffer.stop))

    @abstractmethod
    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        """anchor and live := the weighted mean of all ranks' live; returns whether there was any weight.

        Args:
            buffer: the same number of elements and the same type on every rank.
            weight: at least 0; each rank's share is its weight over the sum of all. A rank of weight 0
                contributes nothing, even if its values are not finite, and receives the mean like the
                others. If all weights are 0, the anchor stays and live := anchor.
            on_slice: `on_slice(slice, start)` is called once, in this thread, on the slice of the mean
                that this rank owns (float32, or float64 for a float64 buffer; it may be empty) and may
                change it in place; `start` is its offset in the buffer.

        After it every rank holds the same bits. If it raises, anchor is a complete average and live is
        undefined.

        Raises:
            SizeMismatch: on every rank, if sizes, types or weights do not fit.
            RankLost: a rank died.
        """

    def staging(self, buffer: Buffer) -> Tensor:
        """What `start_average` averages of this rank: memory beside live, of its shape and dtype. The first
        call for a buffer makes it, zeros. Collective.

        Raises `MemoryError`, on every rank, where ranks share memory and a host has not enough.
        """
        if buffer.staged is None:
            buffer.staged = torch.zeros_like(buffer.live)
        return buffer.staged

    def start_average(
        self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None, *, staged: bool = False
    ) -> Pending:
        """Starts to average `staging(buffer)`, to which live is copied first. Live may change at once and is
        not written to; the mean becomes the anchor in `Pending.wait`, where the slice step runs.

        A backend that cannot work in the background does everything here, the slice step too.

        Args:
            buffer, weight, on_slice: as for `average`, whose errors it raises.
            staged: whether the values are in `staging(buffer)` already; they stay there.
        """
        values, live = self.staging(buffer), buffer.live.clone()
        if staged:
            buffer.live.copy_(values)
        else:
            values.copy_(live)
        try:
            any_weight = self.average(buffer, weight, on_slice)
        finally:
            buffer.live.copy_(live)
        return _Done(values, any_weight)

    def recover(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """New buffers of this communicator for those of one that lost ranks: anchor and live are the newest
        average that every one of `buffers` has complete on some surviving rank; their values move to the
        ranks that lack them. `buffers` are averaged together, in this order. So is what the slice steps of
        that average have kept; values that no surviving rank can read become 0: see `SliceState.lost`.
        Collective, among survivors.

        Raises `CommunicationError`, on every rank, where no average was complete.
        """
        held = [buffer.averages() for buffer in buffers]
        versions = self.allgather([sorted(averages) for averages in held])
        newest = [max((v for of in versions for v in of[i]), default=0) for i in range(len(buffers))]
        number = min(newest, default=0)
        roots = [[r for r, of in enumerate(versions) if number in of[i]] for i in range(len(buffers))]
        if not all(roots):
            raise CommunicationError(
                "no complete average is left on the surviving ranks: the newest of each buffer are "
                f"{newest}. Start again from a checkpoint.",
                agreed=True,
            )
        return [self._restore(*of, number) for of in zip(buffers, held, [r[0] for r in roots], strict=True)]

    def _restore(self, old: Buffer, held: dict[int, Tensor], root: int, number: int) -> Buffer:
        new = self.buffer(old.numel, old.dtype)
        if self.rank == root:
            new.live.copy_(held[number])
        new.version = number - 1
        self.average(new, 1.0 if self.rank == root else 0.0)
        if old.kept is not None:
            self._restore_state(old, old.kept, new, number)
        return new

    def _restore_state(self, old: Buffer, kept: SliceState, new: Buffer, number: int) -> None:
        self.keep_state(new, kept.num_values)
        spans = self.allgather((kept.readable, (new.start, new.stop)))
        readable, owned = zip(*spans, strict=True)
        lost = 0
        for start, stop, reader, owner in deal(readable, owned, _PIECE_ELEMENTS):
            if reader is None:
                lost += stop - start
                continue
            values = torch.empty(0)
            if self.rank == reader:  # a copy: of a view the whole memory would be sent
                values = old.state_of(number, start, stop).clone()
            if reader != owner:
                values = self.broadcast(values, reader)
            if self.rank == owner:
                new.state[:, start - new.start : stop - new.start] = values
        assert new.kept is not None
        new.kept = replace(new.kept, lost=lost)

    def gather_values(self, row: Sequence[float]) -> np.ndarray:
        """The rows of all ranks, float64 [size, len(row)], by one allreduce: each rank fills its own row
        and the others add zeros to it, which changes no bit of any value (but the sign of a zero)."""
        table = np.zeros((self.size, len(row)))
        table[self.rank] = row
        return self.allreduce(table, Op.SUM)

    @abstractmethod
    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        """Reduces a few control values, float64 of any shape, element by element; the result is new."""

    @abstractmethod
    def broadcast(self, value: T, root: int = 0) -> T:
        """The small Python value of rank `root`; what the others pass is ignored."""

    @abstractmethod
    def allgather(self, value: T) -> list[T]:
        """The small Python values of all ranks, in rank order."""

    @abstractmethod
    def barrier(self, timeout_s: float | None = None) -> None:
        """Returns when all ranks have called it.

        Args:
            timeout_s: seconds to wait, whatever the others do; by default as long as in any other call.

        Raises `BarrierTimeout`, naming the missing ranks where the backend can know them. The communicator
        cannot be used after that.
        """

    def mpi_comm(self) -> int | None:
        """The address of an MPI_Comm that nothing else uses: a duplicate, whose calls return their errors. It
        is revoked and freed with this communicator. None where the backend has no MPI. Collective."""
        return None

    def has_lost(self) -> bool:
        """Whether this rank knows that a rank was lost. Not collective."""
        return False

    def revoke(self) -> None:
        """Makes every rank that waits in this communicator, or comes to it later, raise `RankLost`. Not
        collective. It does nothing where `loses_ranks` is false."""
        return

    def survivors(self) -> Communicator:
        """The surviving ranks, in their order, as a new communicator; this one cannot be used afterwards.
        Collective among the survivors, after each has had its `RankLost`.

        Raises `CommunicationError` where `loses_ranks` is false.
        """
        raise CommunicationError(
            f"{self.where}: backend `{self.name}` ({self.library}) cannot "
            "continue without a lost rank. Expected backend `ring` or `mpi` on Open MPI 5, started by "
            "`mpirun --with-ft ulfm`. Start again from the last checkpoint."
        )

    def abort(self, code: int) -> NoReturn:
        """Ends the whole job now with this exit code. Not collective; never returns."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.liveness.discard()
        self._abort(code)

    @abstractmethod
    def _abort(self, code: int) -> NoReturn:
        """What `abort` does by the backend's means."""

    @abstractmethod
    def close(self) -> None:
        """Ends the use of the communicator; nothing may be called after it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes. After an exception that only this rank has, in a world of several, it reports it and ends
        the job: the others would wait for this rank for ever. So it does where closing fails. After
        `sys.exit`, which may have been called on every rank, it leaves that to the end of the process."""
        if self.size > 1 and isinstance(error, SystemExit) and ending.code_of(error) != 0:
            ending.announce(ending.Failing(ending.code_of(error), self.where))
            return
        alone = self.size > 1 and error is not None and not getattr(error, "agreed", False)
        if error is not None and alone and not isinstance(error, SystemExit):
            self._end_job(error)
        try:
            self.close()
        except CommunicationError as failed:
            if self.size == 1:
                raise
            self._end_job(failed)

    def _end_job(self, error: BaseException) -> NoReturn:
        """Reports an exception that only this rank has, and ends the job."""
        if isinstance(error, CommunicationError):
            # Another rank is the cause and reports it; the launcher then ends this one.
            time.sleep(_GRACE_S)
        if isinstance(error, UserError):
            sys.stderr.write(f"hvd_train: {self.where}: {error}\n")
        elif isinstance(error, KeyboardInterrupt):
            sys.stderr.write(f"hvd_train: {self.where}: interrupted from the keyboard\n")
        else:
            sys.stderr.write(f"{self.where}:\n{''.join(traceback.format_exception(error))}")
        sys.stderr.flush()
        time.sleep(_READING_S)
        self.abort(2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1)
