"""What every communicator promises. Runs on every rank of a job at once: see test_communicators.py.

Values differ by rank and by index, and the references are computed on each rank alone.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from hvd_train.comm.base import Communicator, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.factory import connect
from hvd_train.errors import BarrierTimeout, CommunicationError, SizeMismatch
from tests.deadlines import Deadline, seconds

BACKEND = os.environ["CONTRACT_BACKEND"]
HOSTS = [int(ranks) for ranks in os.environ["CONTRACT_HOSTS"].split(",")]
"""The number of ranks on each host; ranks are numbered host by host."""
MEETING = Path(os.environ["CONTRACT_MEETING"])
"""An empty folder that all ranks see: where they can meet when their communicator is of no use any more."""
DTYPES = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative error allowed: the rounding of one conversion and of a sum of a few terms."""


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    with connect(BACKEND) as comm:
        yield comm


def sizes(p: int) -> list[int]:
    return sorted({0, 1, p - 1, p, p + 1, 1009, 65_537})


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    index = torch.arange(numel, dtype=torch.float32)
    return ((index % 1013 * 0.37 - rank * 1.7) * (rank + 1) / 100 + index % 5 - 2).to(dtype)


def expected(weights: list[float], numel: int, dtype: torch.dtype) -> torch.Tensor:
    total = sum(weights)
    terms = [values(r, numel, dtype).double() * (w / total) for r, w in enumerate(weights) if w > 0]
    return torch.stack(terms).sum(0)


def filled(comm: Communicator, numel: int, dtype: torch.dtype) -> Buffer:
    buffer = comm.buffer(numel, dtype)
    buffer.live.copy_(values(comm.rank, numel, dtype))
    return buffer


def assert_average(comm: Communicator, buffer: Buffer, weights: list[float]) -> None:
    reference = expected(weights, buffer.numel, buffer.dtype)
    bound = DTYPES[buffer.dtype] * (reference.abs() + comm.size * 4)
    assert ((buffer.live.double() - reference).abs() <= bound).all()
    assert torch.equal(buffer.live, buffer.anchor)
    digests = comm.allgather(xxhash.xxh3_128_digest(buffer.live.view(torch.uint8).numpy()))
    assert len(set(digests)) == 1, "the ranks hold different bits"


def test_the_world_is_the_promised_one(comm: Communicator) -> None:
    assert (comm.size, comm.num_hosts) == (sum(HOSTS), len(HOSTS))
    assert comm.allgather(comm.rank) == list(range(comm.size))
    places = comm.allgather((comm.local_rank, comm.local_size))
    assert places == [(local_rank, ranks) for ranks in HOSTS for local_rank in range(ranks)]
    names = comm.allgather(comm.host)
    assert len(set(names)) == len(HOSTS)
    firsts = [sum(HOSTS[:host]) for host in range(len(HOSTS))]
    assert names == [names[first] for first, ranks in zip(firsts, HOSTS, strict=True) for _ in range(ranks)]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_average_is_the_weighted_mean_for_every_size(comm: Communicator, dtype: torch.dtype) -> None:
    weights = [float(3 * r + 1) for r in range(comm.size)]
    for numel in sizes(comm.size):
        buffer = filled(comm, numel, dtype)
        assert comm.average(buffer, weights[comm.rank]) is True
        assert_average(comm, buffer, weights)


def test_average_of_ten_million(comm: Communicator) -> None:
    weights = [float(r + 1) for r in range(comm.size)]
    buffer = filled(comm, 10_000_000, torch.float32)
    comm.average(buffer, weights[comm.rank])
    assert_average(comm, buffer, weights)


def test_the_previous_anchor_stays_beside_the_new_one(comm: Communicator) -> None:
    buffer = filled(comm, 1009, torch.float32)
    comm.average(buffer, 1.0)
    first = buffer.anchor.clone()
    for round in range(3):
        buffer.live.add_(comm.rank + round + 1)
        comm.average(buffer, 1.0)
        assert torch.equal(buffer.previous, first)
        step = round + 1 + (comm.size - 1) / 2
        torch.testing.assert_close(buffer.anchor, first + step, rtol=1e-5, atol=1e-5)
        first = buffer.anchor.clone()


def test_a_rank_of_weight_zero_contributes_nothing_even_if_it_is_not_finite(comm: Communicator) -> None:
    for poison in (float("nan"), float("inf")):
        for sick in range(comm.size if comm.size > 1 else 0):
            weights = [0.0 if r == sick else 2.0 + r for r in range(comm.size)]
            buffer = filled(comm, 1009, torch.float32)
            if comm.rank == sick:
                buffer.live.fill_(poison)
            comm.average(buffer, weights[comm.rank])
            assert_average(comm, buffer, weights)


def test_without_any_weight_the_anchor_is_kept(comm: Communicator) -> None:
    buffer = filled(comm, 1009, torch.float32)
    comm.average(buffer, 1.0)
    anchor = buffer.anchor.clone()
    buffer.live.fill_(float("nan"))
    called = []
    assert comm.average(buffer, 0.0, lambda s, start: called.append(start)) is False
    assert torch.equal(buffer.live, anchor)
    assert torch.equal(buffer.anchor, anchor)
    assert called == []


def test_one_rank_with_all_the_weight_is_a_broadcast(comm: Communicator) -> None:
    root = comm.size - 1
    buffer = filled(comm, 1009, torch.float32)
    comm.average(buffer, 5.0 if comm.rank == root else 0.0)
    assert torch.equal(buffer.live, values(root, 1009, torch.float32))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_the_slice_step_changes_the_owned_slice_in_place(comm: Communicator, dtype: torch.dtype) -> None:
    for numel in sizes(comm.size):
        buffer = filled(comm, numel, dtype)
        calls: list[tuple[int, int, torch.dtype]] = []

        def on_slice(
            owned: torch.Tensor, start: int, calls: list[tuple[int, int, torch.dtype]] = calls
        ) -> None:
            calls.append((start, owned.numel(), owned.dtype))
            owned.mul_(2).add_(torch.arange(start, start + owned.numel()) % 3)

        comm.average(buffer, 1.0, on_slice)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert calls == [(buffer.start, buffer.stop - buffer.start, wide)]
        owned = sorted((a, b) for a, b in comm.allgather((buffer.start, buffer.stop)) if a < b)
        starts, stops = [a for a, _ in owned], [b for _, b in owned]
        assert [*starts, numel] == [0, *stops], "every element has one owner"
        reference = expected([1.0] * comm.size, numel, dtype) * 2 + torch.arange(numel) % 3
        bound = DTYPES[dtype] * (reference.abs() + comm.size * 8)
        assert ((buffer.live.double() - reference).abs() <= bound).all()


def kept(version: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Two values for each of some elements, other ones for each number of averages."""
    index = torch.arange(start, stop, dtype=dtype)
    return torch.stack((index + 1000 * version, index * 2 - version))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_what_a_slice_step_keeps_moves_on_with_the_anchor(comm: Communicator, dtype: torch.dtype) -> None:
    """Also after an average that failed in the slice step; where ranks share memory each sees all of it."""
    for numel in sizes(comm.size):
        buffer = filled(comm, numel, dtype)
        owned = (buffer.start, buffer.stop)
        assert owned == comm.owned(numel)
        comm.keep_state(buffer, 2)
        comm.average(buffer, 1.0)
        assert (buffer.state == 0).all()
        buffer.state.copy_(kept(1, *owned, buffer.wide))

        def step(mean: torch.Tensor, start: int, fails: bool, buffer: Buffer = buffer) -> None:
            buffer.next_state.copy_(buffer.state + torch.tensor([[1000], [-1]]))
            if fails:
                raise RuntimeError("slice step")

        for version in (2, 3):
            with pytest.raises(RuntimeError, match="slice step"):
                comm.average(buffer, 1.0, functools.partial(step, fails=True))
            assert torch.equal(buffer.state, kept(version - 1, *owned, buffer.wide))
            comm.average(buffer, 1.0, functools.partial(step, fails=False))
            assert torch.equal(buffer.state, kept(version, *owned, buffer.wide))
        readable = buffer.kept.readable  # type: ignore[union-attr]
        for rank, host, start, stop in comm.allgather((comm.rank, comm.host, *owned)):
            if rank == comm.rank or (comm.name == "ring" and host == comm.host):
                assert readable[0] <= start <= stop <= readable[1]
                for version in (2, 3):
                    expected = kept(version, start, stop, buffer.wide)
                    assert torch.equal(buffer.state_of(version, start, stop), expected)


def test_a_slice_step_may_gather_a_few_values_in_the_background_too(comm: Communicator) -> None:
    buffer = filled(comm, 1009, torch.float32)
    weights, seen = [float(r + 1) for r in range(comm.size)], []

    def on_slice(owned: torch.Tensor, start: int) -> None:
        seen.append(comm.gather_values([float(owned.numel())])[:, 0].tolist())

    comm.average(buffer, weights[comm.rank], on_slice)
    assert_average(comm, buffer, weights)
    assert comm.start_average(buffer, 1.0, on_slice).wait() is True
    assert seen == [comm.allgather(buffer.stop - buffer.start)] * 2


def test_runs_repeat_to_the_bit_for_any_timing(comm: Communicator) -> None:
    results = []
    for attempt in range(4):
        buffer = filled(comm, 65_537, torch.float32)
        time.sleep(random.Random(comm.rank + 10 * attempt).random() * 0.02)
        comm.average(buffer, float(comm.rank + 1))
        results.append(buffer.live.clone())
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_wrong_sizes_on_one_rank_are_an_error_on_all(comm: Communicator) -> None:
    if comm.size == 1:
        return
    odd = comm.size - 1
    with pytest.raises(SizeMismatch, match=rf"rank 0 gave .* elements 100, rank {odd} .* 101"):
        comm.average(comm.buffer(101 if comm.rank == odd else 100, torch.float32), 1.0)
    dtype = torch.float64 if comm.rank == odd else torch.float32
    with pytest.raises(SizeMismatch, match=f"rank {odd}"):
        comm.average(comm.buffer(100, dtype), 1.0)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_invalid_weight_is_an_error_on_all_ranks(comm: Communicator, weight: float) -> None:
    odd = comm.size - 1
    buffer = filled(comm, 10, torch.float32)
    with pytest.raises(SizeMismatch, match=f"rank {odd} gave the weight {weight}"):
        comm.average(buffer, weight if comm.rank == odd else 1.0)
    assert comm.average(buffer, 1.0), "the communicator must still work"


def test_a_failing_slice_step_leaves_the_anchor(comm: Communicator) -> None:
    """Every rank fails in its slice step; the anchor is x_t on each of them, and the next average works."""
    buffer = filled(comm, 1009, torch.float32)
    comm.average(buffer, 1.0)
    anchor = buffer.anchor.clone()
    buffer.live.add_(1)

    def fail(owned: torch.Tensor, start: int) -> None:
        raise RuntimeError("slice step")

    with pytest.raises(RuntimeError, match="slice step"):
        comm.average(buffer, 1.0, fail)
    assert torch.equal(buffer.anchor, anchor)
    buffer.live.copy_(buffer.anchor)
    comm.average(buffer, 1.0)
    torch.testing.assert_close(buffer.anchor, anchor)


def test_an_average_in_the_background_leaves_live_to_the_training(comm: Communicator) -> None:
    for numel in sizes(comm.size):
        buffer = filled(comm, numel, torch.float32)
        for _ in range(2):
            before, weights = buffer.anchor.clone(), [float(r + 1) for r in range(comm.size)]
            buffer.live.copy_(values(comm.rank, numel, torch.float32))
            pending = comm.start_average(buffer, weights[comm.rank])
            assert torch.equal(pending.staged, values(comm.rank, numel, torch.float32))
            if comm.name == "ring":
                assert torch.equal(buffer.anchor, before), "the anchor must not change before `wait`"
            buffer.live.fill_(comm.rank + 0.5)
            assert pending.wait() is True
            assert pending.test() is True
            assert (buffer.live == comm.rank + 0.5).all()
            buffer.live.copy_(buffer.anchor)
            assert_average(comm, buffer, weights)


def test_the_slice_step_of_an_average_in_the_background(comm: Communicator) -> None:
    buffer = filled(comm, 65_537, torch.float32)
    threads: list[int] = []

    def on_slice(owned: torch.Tensor, start: int) -> None:
        threads.append(threading.get_ident())
        owned.add_(1)

    pending = comm.start_average(buffer, 1.0, on_slice)
    while not pending.test():
        time.sleep(0.001)
    assert pending.wait() is True
    assert threads == [threading.get_ident()], "the slice step runs once, in the calling thread"
    reference = expected([1.0] * comm.size, 65_537, torch.float32) + 1
    torch.testing.assert_close(buffer.anchor.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_values_are_laid_where_the_background_averages_them(comm: Communicator, dtype: torch.dtype) -> None:
    """They stay there, and can be averaged again."""
    for numel in sizes(comm.size):
        buffer = comm.buffer(numel, dtype)
        buffer.live.fill_(comm.rank + 0.5)
        staged = comm.staging(buffer)
        assert (staged.shape, staged.dtype) == (buffer.live.shape, dtype)
        assert (staged == 0).all()
        assert comm.staging(buffer) is staged
        staged.copy_(values(comm.rank, numel, dtype))
        for turn in range(2):
            weights = [float((r + turn) % 3 + 1) for r in range(comm.size)]
            pending = comm.start_average(buffer, weights[comm.rank], staged=True)
            assert pending.staged is staged
            assert pending.wait() is True
            assert (buffer.live == comm.rank + 0.5).all()
            assert torch.equal(staged, values(comm.rank, numel, dtype))
            buffer.live.copy_(buffer.anchor)
            assert_average(comm, buffer, weights)
            buffer.live.fill_(comm.rank + 0.5)


def test_a_slice_step_that_fails_ends_an_average_in_the_background(comm: Communicator) -> None:
    """Nothing has changed, nothing is pending, and what was staged can be averaged again."""
    weights = [float(r + 1) for r in range(comm.size)]
    buffer = filled(comm, 65_537, torch.float32)
    comm.average(buffer, 1.0)
    anchor = buffer.anchor.clone()
    comm.staging(buffer).copy_(values(comm.rank, 65_537, torch.float32))

    def fail(owned: torch.Tensor, start: int) -> None:
        comm.allreduce(np.zeros(1), Op.SUM)
        raise RuntimeError("slice step")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="slice step"):
            comm.start_average(buffer, 1.0, fail, staged=True).wait()
        assert buffer.version == 1
        assert torch.equal(buffer.anchor, anchor)
        assert torch.equal(buffer.live, anchor)
    assert comm.start_average(buffer, weights[comm.rank], lambda mean, start: None, staged=True).wait()
    buffer.live.copy_(buffer.anchor)
    assert_average(comm, buffer, weights)


def test_no_weight_and_a_wrong_size_in_the_background(comm: Communicator) -> None:
    buffer = filled(comm, 1009, torch.float32)
    comm.average(buffer, 1.0)
    anchor = buffer.anchor.clone()
    buffer.live.fill_(7)
    assert comm.start_average(buffer, 0.0).wait() is False
    assert torch.equal(buffer.anchor, anchor)
    assert (buffer.live == 7).all()
    odd = comm.size - 1
    with pytest.raises(SizeMismatch, match=f"rank {odd} gave the weight -1"):
        comm.start_average(buffer, -1.0 if comm.rank == odd else 1.0)
    assert comm.start_average(buffer, 1.0).wait() is True, "the communicator must still work"


def test_nothing_else_is_called_while_the_ring_averages(comm: Communicator) -> None:
    if comm.name != "ring":
        return
    buffer = filled(comm, 1009, torch.float32)
    pending = comm.start_average(buffer, 1.0)
    for call in (
        lambda: comm.average(buffer, 1.0),
        lambda: comm.allreduce(np.zeros(1), Op.SUM),
        lambda: comm.barrier(30),
        lambda: comm.buffer(3, torch.float32),
        lambda: comm.staging(buffer),
        lambda: comm.start_average(buffer, 1.0),
    ):
        with pytest.raises(CommunicationError, match="call `wait` on it"):
            call()
    assert pending.wait() is True
    assert comm.average(buffer, 1.0)


def test_recover_gives_the_newest_average_that_all_buffers_have(comm: Communicator) -> None:
    first, second = filled(comm, 1009, torch.float32), filled(comm, 257, torch.float64)
    for buffer in (first, second, first, second, first):
        buffer.live.add_(comm.rank)
        comm.average(buffer, 1.0)
    assert (first.version, second.version) == (3, 2)
    wanted = first.previous.clone(), second.anchor.clone()
    recovered = comm.recover([first, second])
    for buffer, value in zip(recovered, wanted, strict=True):
        assert buffer.version == 2
        assert torch.equal(buffer.anchor, value)
        assert torch.equal(buffer.live, value)
    assert comm.average(recovered[0], 1.0)
    assert recovered[0].version == 3


def test_recover_brings_back_what_slice_steps_have_kept(comm: Communicator) -> None:
    """That of the average that is recovered, not that of a later one."""
    first, second = filled(comm, 1009, torch.float32), filled(comm, 257, torch.float64)
    comm.average(first, 1.0)
    comm.average(second, 1.0)
    for buffer in (first, second):
        comm.keep_state(buffer, 2)
        buffer.state.copy_(kept(1, buffer.start, buffer.stop, buffer.wide))
    step = torch.tensor([[1000], [-1]])
    for buffer in (first, second, first):
        comm.average(buffer, 1.0, lambda mean, start, b=buffer: b.next_state.copy_(b.state + step))  # type: ignore[misc]
    recovered = comm.recover([first, second])
    for buffer in recovered:
        assert buffer.kept is not None
        assert (buffer.version, buffer.kept.lost) == (2, 0)
        assert torch.equal(buffer.state, kept(2, buffer.start, buffer.stop, buffer.wide))


def test_integers_cannot_be_averaged(comm: Communicator) -> None:
    with pytest.raises(TypeError, match=r"torch\.int64 cannot be averaged"):
        comm.buffer(3, torch.int64)


def test_allreduce_of_control_values(comm: Communicator) -> None:
    mine = np.array([[comm.rank + 1.0, -comm.rank], [0.5 * comm.rank, 2.0**53 - comm.rank]])
    table = np.stack([[[r + 1.0, -r], [0.5 * r, 2.0**53 - r]] for r in range(comm.size)])
    assert (comm.allreduce(mine, Op.MIN) == table.min(0)).all()
    assert (comm.allreduce(mine, Op.MAX) == table.max(0)).all()
    np.testing.assert_allclose(comm.allreduce(mine, Op.SUM), table.sum(0), rtol=1e-15)
    assert (mine == table[comm.rank]).all(), "the argument must not change"


def test_gather_values_keeps_every_bit(comm: Communicator) -> None:
    row = (0.1 * (comm.rank + 1), float(2**32 - 1 - comm.rank), float("nan") if comm.rank == 0 else -1.0)
    table = comm.gather_values(row)
    assert table.shape == (comm.size, 3)
    for r in range(comm.size):
        assert table[r, 0] == 0.1 * (r + 1)
        assert table[r, 1] == 2**32 - 1 - r
        assert np.isnan(table[r, 2]) == (r == 0)


def test_small_python_values(comm: Communicator) -> None:
    mine = {"rank": comm.rank, "text": "x" * (10 * comm.rank), "tensor": torch.full((comm.rank,), 7)}
    for root in {0, comm.size - 1}:
        got = comm.broadcast(mine, root)
        assert (got["rank"], got["text"]) == (root, "x" * (10 * root))
        assert torch.equal(got["tensor"], torch.full((root,), 7))
    assert [v["rank"] for v in comm.allgather(mine)] == list(range(comm.size))


def test_no_rank_leaves_a_barrier_before_all_have_reached_it(comm: Communicator) -> None:
    for late in range(comm.size):
        for name, timeout_s in (("own", None), ("given", seconds(30))):
            time.sleep(0.1 if comm.rank == late else 0)
            (MEETING / f"{name}-{late}-{comm.rank}").touch()
            comm.barrier(timeout_s)
            assert len(list(MEETING.glob(f"{name}-{late}-*"))) == comm.size


def test_a_barrier_names_the_missing_ranks(comm: Communicator) -> None:
    """The last test: the communicator cannot be used after a barrier that failed."""
    if comm.size == 1:
        return
    absent = comm.size - 1
    if comm.rank != absent:
        # Long enough for those that come.
        timeout_s = float(round(2 * seconds(1)))
        with pytest.raises(BarrierTimeout, match=rf"arrive at the barrier within {timeout_s:g} s") as caught:
            comm.barrier(timeout_s)
        if comm.name in ("mpi", "ring"):
            assert caught.value.missing == (absent,)
        (MEETING / f"missed-{comm.rank}").touch()
    # Nobody ends, and takes the transport with it, before the last has waited in vain.
    deadline = Deadline(60)
    while len(list(MEETING.glob("missed-*"))) < comm.size - 1:
        assert not deadline.passed(), "some ranks did not notice that one is missing"
        time.sleep(0.02)
