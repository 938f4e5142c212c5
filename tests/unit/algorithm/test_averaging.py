"""What an average finds and reports: distances, drift, hashes, counts. Real jobs are in tests/mpi."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.averaging import NoAverage, StateAverage, check_bits, drift, report
from hvd_train.algorithm.distances import squared_distance
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.header import Header, Work, exchange
from hvd_train.algorithm.period.adacomm import AdaCommPeriod
from hvd_train.algorithm.period.drift import DriftPeriod
from hvd_train.algorithm.period.given import QsrPeriod, WarmupPeriod
from hvd_train.comm.base import Communicator, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import BitsDiffer
from tests.threads import ThreadCommunicator, on_ranks

BLOCK = 1 << 16


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    return module


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def state_average(module: nn.Module, comm: Communicator) -> StateAverage:
    average = StateAverage(FlatState(module, sgd(module), comm), comm)
    average.start()
    return average


@pytest.mark.parametrize("numel", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squared_distance_at_the_ends_of_blocks(numel: int, dtype: torch.dtype) -> None:
    index = torch.arange(numel)
    a, b = torch.sin(index * 0.1).to(dtype), torch.cos(index * 0.07).to(dtype)
    expected = float((a.double() - b.double()).square().sum())
    relative = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-4)
    assert squared_distance(a, b) == pytest.approx(expected, rel=relative, abs=1e-30)
    if numel:
        b[-1] = float("nan")
        assert not math.isfinite(squared_distance(a, b)), "the last element counts"


def test_squared_distance_does_not_lose_small_parts() -> None:
    """One block of large differences and many of small ones: float32 alone would drop the latter."""
    a = torch.ones(64 * BLOCK)
    a[:BLOCK] = 4096
    assert squared_distance(a, torch.zeros_like(a)) == BLOCK * 4096**2 + 63 * BLOCK


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, poison: float | None) -> None:
    """Also in float16, whose sum of many ordinary values is larger than its largest number."""
    module = nn.Linear(1000, 200).to(dtype)
    nn.init.constant_(module.weight, 1.0)
    average = state_average(module, SoloCommunicator())
    if poison is not None:
        with torch.no_grad():
            module.weight[-1, -1] = poison
    for distance in (False, True):
        assert average.inspect(distance=distance, verify=False).finite is (poison is None)


def test_inspection_measures_what_it_is_asked_for() -> None:
    module = model()
    average = state_average(module, SoloCommunicator())
    nothing = average.inspect(distance=False, verify=False)
    assert (nothing.finite, nothing.distance, nothing.moved, nothing.hash) == (True, -1.0, -1.0, None)
    with torch.no_grad():
        module.weight += 0.5
    assert average.inspect(distance=True, verify=False).distance == pytest.approx(15 * 0.25)
    average.average(1.0, healthy=True)
    found = average.inspect(distance=False, verify=True)
    assert found.moved == pytest.approx(15 * 0.25)
    assert found.hash == xxhash.xxh3_64_intdigest(average._buffers[Part(torch.float32)].live.numpy())


def last_hash(average: StateAverage) -> int:
    taken = average.inspect(distance=False, verify=True).hash
    assert taken is not None
    return taken


def test_the_hash_is_of_every_bit_of_the_last_average() -> None:
    module = model()
    average = state_average(module, SoloCommunicator())
    first = last_hash(average)
    assert first == last_hash(state_average(model(), SoloCommunicator()))
    with torch.no_grad():
        module.bias[-1] = torch.nextafter(module.bias[-1], torch.tensor(9.0))
    assert last_hash(average) == first, "what was trained since is not the average"
    average.average(1.0, healthy=True)
    assert last_hash(average) != first
    assert 0 <= last_hash(average) < 1 << 64
    average.average(1.0, healthy=True, verify=False)
    assert average.inspect(distance=False, verify=True).hash is None


def test_the_hash_survives_the_header() -> None:
    """A float64 holds 53 bits, so that the 64 go in halves."""
    average = state_average(model(), SoloCommunicator())
    row = report(average.inspect(distance=False, verify=True), Work(samples=1))
    high, low = int(row.hash_high), int(row.hash_low)
    assert (high << 32) + low == last_hash(average)


WEIGHTS = [3.0, 0.0, 1.0, 4.0]


def rounds_with_drift(comm: ThreadCommunicator) -> tuple[Header, Header, torch.Tensor, torch.Tensor]:
    module = model()
    average = state_average(module, comm)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.sin(torch.arange(p.numel()) * 1.3 + comm.rank).reshape(p.shape))
    mine = torch.cat([p.detach().flatten() for p in module.parameters()])
    found = average.inspect(distance=True, verify=False)
    before = exchange(comm, report(found, Work(samples=WEIGHTS[comm.rank])))
    average.average(float(before.weights[comm.rank]), healthy=True)
    mean = torch.cat([p.detach().flatten() for p in module.parameters()])
    found = average.inspect(distance=False, verify=True)
    return before, exchange(comm, report(found, Work(samples=1))), mine, mean


def test_drift_is_the_weighted_mean_squared_distance_from_the_mean() -> None:
    results = on_ranks(4, rounds_with_drift)
    vectors = [mine.double() for _, _, mine, _ in results]
    total = sum(WEIGHTS)
    mean = sum(w / total * v for w, v in zip(WEIGHTS, vectors, strict=True))
    expected = sum(
        w / total * float((v - mean).square().sum()) for w, v in zip(WEIGHTS, vectors, strict=True)
    )
    for before, after, _, found in results:
        torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-6)
        assert drift(before, after["moved"]) == pytest.approx(expected, rel=1e-4)
        check_bits(after)


def test_drift_of_ranks_that_agree_is_not_negative() -> None:
    def run(comm: ThreadCommunicator) -> float:
        module = model()
        average = state_average(module, comm)
        with torch.no_grad():
            module.weight.mul_(1.1)
        found = average.inspect(distance=True, verify=False)
        before = exchange(comm, report(found, Work(samples=1)))
        average.average(1.0, healthy=True)
        after = report(average.inspect(distance=False, verify=True), Work(samples=1))
        return drift(before, exchange(comm, after)["moved"])

    for value in on_ranks(3, run):
        assert 0 <= value < 1e-6


def flipping(average: Callable[..., bool]) -> Callable[..., bool]:
    """An average after which one element of this rank's copy is another, as a faulty memory would have it."""

    def average_and_flip(buffer: Buffer, *args: Any) -> bool:
        averaged = average(buffer, *args)
        buffer.live[1] += 1
        return averaged

    return average_and_flip


def test_different_bits_are_an_error_that_names_the_ranks() -> None:
    def run(comm: ThreadCommunicator) -> str:
        average = state_average(model(), comm)
        if comm.rank == 2:
            comm.average = flipping(comm.average)  # type: ignore[method-assign]
        average.average(1.0, healthy=True)
        row = report(average.inspect(distance=False, verify=True), Work(samples=1))
        with pytest.raises(BitsDiffer, match="ranks \\[2\\] did not hold the same bits") as caught:
            check_bits(exchange(comm, row))
        assert caught.value.agreed
        return str(caught.value)

    assert len(set(on_ranks(3, run))) == 1


def test_without_averaging_ranks_start_alike_and_then_stay_apart() -> None:
    def run(comm: ThreadCommunicator) -> tuple[float, float, object]:
        module = model()
        with torch.no_grad():
            module.bias.fill_(comm.rank)
        average = NoAverage(StateAverage(FlatState(module, sgd(module), comm), comm))
        average.start()
        started = float(module.bias.detach()[0])
        with torch.no_grad():
            module.bias.fill_(comm.rank + 0.5)
        found = average.inspect(distance=True, verify=True)
        average.average(1.0, healthy=True)
        return (
            started,
            float(module.bias.detach()[0]),
            (found.finite, found.distance, found.moved, found.hash),
        )

    nothing = (True, -1.0, -1.0, None)
    assert on_ranks(3, run) == [(0.0, 0.5, nothing), (0.0, 1.5, nothing), (0.0, 2.5, nothing)]


def messages(comm: SoloCommunicator, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []
    plain = comm.allreduce

    def counted(values, op: Op):  # type: ignore[no-untyped-def]
        sent.append("allreduce")
        return plain(values, op)

    monkeypatch.setattr(comm, "allreduce", counted)
    return sent


def test_the_averager_averages_after_every_period(monkeypatch: pytest.MonkeyPatch) -> None:
    module, comm = model(), SoloCommunicator()
    averager = Averager(module, sgd(module), comm, period=3)
    sent = messages(comm, monkeypatch)
    assert [averager.step(4) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert averager.rounds == 2
    per_round = len(sent) // 2
    assert len(sent) == 2 * per_round > 0, "nothing is sent between averages"
    averager.finish()
    assert averager.rounds == 3
    averager.finish()
    assert averager.rounds == 3, "nothing is left to average"
    assert len(sent) == 3 * per_round
    assert averager.step(4) is False
    averager.average()
    assert [averager.step(4) for _ in range(3)] == [False, False, True], "the period begins anew"


def test_finish_counts_steps_and_not_samples() -> None:
    """A rank without data calls step(0): if it did not take part, the others would wait for it for ever."""

    def run(comm: ThreadCommunicator) -> tuple[int, float]:
        module = model()
        averager = Averager(module, sgd(module), comm, period=10)
        with torch.no_grad():
            module.bias.fill_(float(comm.rank))
        averager.step(0 if comm.rank == 0 else 8)
        averager.finish()
        averager.finish()
        return averager.rounds, float(module.bias.detach()[0])

    assert on_ranks(3, run) == [(1, 1.5)] * 3


def test_samples_of_a_whole_period_are_the_weight() -> None:
    def run(comm: ThreadCommunicator) -> tuple[list[float], float]:
        module = model()
        averager = Averager(module, sgd(module), comm, period=100)
        with torch.no_grad():
            module.bias.fill_(float(comm.rank))
        for _ in range(3):
            averager.step(1 + 2 * comm.rank)
        header = averager.average()
        again = averager.average()
        assert again["samples"].tolist() == [0, 0], "counted once"
        return header["samples"].tolist(), float(module.bias.detach()[0])

    assert on_ranks(2, run) == [([3.0, 9.0], 0.75)] * 2


@pytest.mark.parametrize(
    ("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [2, 5])]
)
def test_how_often_the_averager_proves_that_bits_are_the_same(every: int, expected: list[int]) -> None:
    """`expected`: in which averages a hash of the one before is compared; the first may have the start's."""
    module = model()
    averager = Averager(module, sgd(module), SoloCommunicator(), period=1, check_every=every)
    verified = [i for i in range(1, 7) if averager.average().verified]
    assert verified == expected


def test_an_invalid_period_is_refused() -> None:
    with pytest.raises(ValueError, match="period = 0: expected at least 1 local step"):
        Averager(model(), sgd(model()), SoloCommunicator(), period=0)


def test_a_schedule_of_your_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    module, comm = model(), SoloCommunicator()
    first = Averager(module, sgd(module), comm, WarmupPeriod(3, rounds=5))
    assert [first.step(1) for _ in range(4)] == [True] * 4
    resume = [first.state_dict()]
    averager = Averager(module, sgd(module), comm, WarmupPeriod(3, rounds=5), resume=resume)
    assert [averager.step(1) for _ in range(5)] == [True, False, False, True, False]
    assert (averager.period, averager.rounds) == (3, 6)
    averager.finish()
    averager.average()  # without a local step there is nothing to learn
    assert averager.rounds == 8
    adacomm = Averager(module, sgd(module), comm, AdaCommPeriod(1, steps=1, most=9))
    adacomm.step(4, loss=-0.5)
    assert capsys.readouterr().err.startswith(
        "hvd_train: round 1: the training loss of round 1 is -0.5, and "
    )
    with pytest.raises(ValueError, match="check_every = 0: expected at least 1 with DriftPeriod"):
        Averager(module, sgd(module), comm, DriftPeriod(3, bound=1.0, most=9), check_every=0)


def test_every_rank_of_your_own_loop_has_the_period_of_rank_0() -> None:
    def run(comm: ThreadCommunicator) -> list[int]:
        module = model()
        optimizer = sgd(module)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + comm.rank)
        averager = Averager(module, optimizer, comm, QsrPeriod(1, alpha=0.2, most=9))
        found = [averager.period]
        while averager.rounds < 3:
            if averager.step(1):
                found.append(averager.period)
        return found

    assert on_ranks(2, run) == [[4, 4, 4, 4]] * 2


def test_frozen_parameters_and_counters_come_from_rank_0() -> None:
    def run(comm: ThreadCommunicator) -> tuple[float, int, float]:
        module = nn.Sequential(copy.deepcopy(model()), nn.BatchNorm1d(3))
        module[0].bias.requires_grad_(False)
        with torch.no_grad():
            module[0].bias.fill_(10.0 + comm.rank)
            module[0].weight.fill_(20.0 + comm.rank)
            module[1].num_batches_tracked.fill_(5 + comm.rank)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        Averager(module, optimizer, comm)
        return (
            float(module[0].bias.detach()[0]),
            int(module[1].num_batches_tracked),
            float(module[0].weight.detach()[0, 0]),
        )

    assert on_ranks(3, run) == [(10.0, 5, 20.0)] * 3
