"""A backend that raises in every phase of an average: after each the anchor is a complete x_t or x_(t+1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn, final

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_train.comm.base import Communicator, OnSlice, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.phases import average_in_phases
from hvd_train.errors import RankLost
from tests.threads import ThreadCommunicator, on_ranks, outcomes

SIZE, NUMEL = 3, 11


class Injected(Exception):
    """What the failing backend raises."""


@final
class FailingCommunicator(Communicator):
    """A communicator that works until `phase` is set, and then fails in that phase of the next average."""

    def __init__(self, inner: ThreadCommunicator) -> None:
        self.__dict__.update({k: v for k, v in vars(inner).items() if not k.startswith("_")})
        self._inner = inner
        self.phase = ""

    def _fail(self, phase: str) -> None:
        if self.phase == phase:
            raise Injected(phase)

    def allreduce(self, values: np.ndarray, op: Op) -> np.ndarray:
        self._fail("agreement begins")
        result = self._inner.allreduce(values, op)
        self._fail("agreement ends")
        return result

    def average(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        return average_in_phases(self, self, buffer, weight, on_slice)

    def reduce_scatter(self, staged: Tensor, owned: Tensor) -> None:
        self._fail("reduce-scatter begins")
        self._inner.reduce_scatter(staged, owned)
        if self.phase == "reduce-scatter breaks":
            owned[: owned.numel() // 2].fill_(float("nan"))
            raise Injected(self.phase)
        self._fail("reduce-scatter ends")

    def all_gather(self, owned: Tensor, staged: Tensor) -> None:
        self._fail("all-gather begins")
        if self.phase == "all-gather breaks":
            staged[: NUMEL // 2].fill_(float("nan"))
            raise Injected(self.phase)
        self._inner.all_gather(owned, staged)
        self._fail("all-gather ends")

    def broadcast(self, value, root=0):  # type: ignore[no-untyped-def]
        return self._inner.broadcast(value, root)

    def allgather(self, value):  # type: ignore[no-untyped-def]
        return self._inner.allgather(value)

    def barrier(self, timeout_s: float | None = None) -> None:
        self._inner.barrier(timeout_s)

    def _abort(self, code: int) -> None:
        self._inner._abort(code)

    def close(self) -> None:
        self._inner.close()


def raising(call: Callable[..., object]) -> Callable[..., NoReturn]:
    """`call`, which then fails after it has done its damage."""

    def failing(*args: object) -> NoReturn:
        call(*args)
        raise Injected

    return failing


@contextmanager
def replaced(buffer: Buffer, name: str, value: object) -> Iterator[None]:
    before = getattr(buffer, name)
    setattr(buffer, name, value)
    try:
        yield
    finally:
        setattr(buffer, name, before)


def broken(buffer: Buffer, phase: str) -> object:
    """Makes the buffer itself fail, in the phases that are its own."""
    if phase == "staging ends":
        return replaced(buffer, "stage", raising(buffer.stage))
    if phase == "completion begins":
        return replaced(buffer, "complete", raising(lambda: None))
    if phase == "completion breaks":  # the copy to live, the last thing that an average does, fails
        return replaced(buffer, "live", OneElementShort.of(buffer.live))
    return nullcontext()


@final
class OneElementShort(Tensor):
    """Values that are read as they are, and into which nothing of their size can be copied."""

    @classmethod
    def of(cls, tensor: Tensor) -> OneElementShort:
        return tensor.clone().as_subclass(cls)

    def copy_(self, *args: object, **kwargs: object) -> NoReturn:
        raise Injected("completion breaks")


PHASES = [
    "agreement begins",
    "agreement ends",
    "staging ends",
    "reduce-scatter begins",
    "reduce-scatter breaks",
    "reduce-scatter ends",
    "slice step begins",
    "slice step breaks",
    "all-gather begins",
    "all-gather breaks",
    "all-gather ends",
    "completion begins",
    "completion breaks",
]


def start(rank: int, dtype: torch.dtype) -> Tensor:
    return (torch.sin(torch.arange(NUMEL) * 0.7 + rank) * (rank + 1)).to(dtype)


def train(buffer: Buffer, rank: int, step: int) -> None:
    """What local steps do: every rank, every step and every element is moved otherwise."""
    buffer.live.add_((torch.cos(torch.arange(NUMEL) * 0.3 + 5 * rank) * (step + 1)).to(buffer.dtype))


def slice_step(phase: str) -> Callable[[Tensor, int], None]:
    def on_slice(owned: Tensor, start: int) -> None:
        if phase == "slice step begins":
            raise Injected(phase)
        owned.mul_(1.5)
        if phase == "slice step breaks":
            owned.fill_(float("nan"))
            raise Injected(phase)

    return on_slice


def two_averages(comm: Communicator, dtype: torch.dtype) -> Buffer:
    """A buffer whose both slots have been used."""
    buffer = comm.buffer(NUMEL, dtype)
    buffer.live.copy_(start(comm.rank, dtype))
    for step in range(2):
        train(buffer, comm.rank, step)
        comm.average(buffer, comm.rank + 1.0, slice_step(""))
    return buffer


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t and x_(t+1) of a run in which nothing fails."""

    def run(comm: ThreadCommunicator) -> tuple[Tensor, Tensor]:
        buffer = two_averages(comm, dtype)
        before = buffer.anchor.clone()
        train(buffer, comm.rank, 2)
        comm.average(buffer, comm.rank + 1.0, slice_step(""))
        return before, buffer.anchor.clone()

    before, after = on_ranks(SIZE, run)[0]
    assert not torch.equal(before, after)
    return before, after


@pytest.mark.parametrize("failing", [(0,), (SIZE - 1,), tuple(range(SIZE))], ids=["first", "last", "all"])
@pytest.mark.parametrize("phase", PHASES)
def test_after_a_failure_the_anchor_is_complete(
    phase: str, failing: tuple[int, ...], dtype: torch.dtype, reference: tuple[Tensor, Tensor]
) -> None:
    buffers: dict[int, Buffer] = {}

    def run(inner: ThreadCommunicator) -> None:
        comm = FailingCommunicator(inner)
        buffer = buffers[comm.rank] = two_averages(comm, dtype)
        assert torch.equal(buffer.anchor, reference[0])
        train(buffer, comm.rank, 2)
        comm.phase = phase if comm.rank in failing else ""
        with broken(buffer, comm.phase):  # type: ignore[attr-defined]
            comm.average(buffer, comm.rank + 1.0, slice_step(comm.phase))

    ended = outcomes(SIZE, run)
    newest = []
    for rank, outcome in enumerate(ended):
        assert isinstance(outcome, Injected if rank in failing else (RankLost, type(None))), outcome
        anchor = buffers[rank].anchor
        is_new = torch.equal(anchor, reference[1])
        assert is_new or torch.equal(anchor, reference[0]), f"rank {rank} holds a mixture: {anchor}"
        assert is_new or outcome is not None, "who returns has the new anchor"
        if is_new:
            newest.append(rank)
    late = phase in ("all-gather ends", "completion begins", "completion breaks")
    assert not newest or late, "nobody has x_(t+1) before it was gathered"
    if phase == "completion breaks":
        assert newest == list(range(SIZE))
    go_on(buffers, newest, reference)


def go_on(buffers: dict[int, Buffer], newest: list[int], reference: tuple[Tensor, Tensor]) -> None:
    """The ranks take the newest anchor, and average as if nothing had happened."""
    source = newest[0] if newest else 0
    expected = reference[1] if newest else reference[0]

    def run(comm: ThreadCommunicator) -> Tensor:
        buffer = buffers[comm.rank]
        buffer.live.copy_(buffer.anchor)
        comm.average(buffer, 1.0 if comm.rank == source else 0.0)
        assert torch.equal(buffer.live, expected)
        train(buffer, comm.rank, 3)
        comm.average(buffer, 1.0)
        assert torch.equal(buffer.previous, expected)
        assert torch.equal(buffer.live, buffer.anchor)
        return buffer.anchor.clone()

    after = on_ranks(SIZE, run)
    moved = [torch.cos(torch.arange(NUMEL) * 0.3 + 5 * rank) * 4 for rank in range(SIZE)]
    mean = expected.float() + torch.stack(moved).mean(0)
    tolerance = 1e-6 if expected.dtype is torch.float32 else 0.1
    assert (after[0].float() - mean).abs().max() < tolerance
    assert all(torch.equal(after[0], other) for other in after)
