"""What averaging promises, on every rank of a real job: see test_averaging.py."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.averaging import StateAverage, drift, report
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.header import Work, exchange
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.errors import BitsDiffer, RanksDisagree, ViewReplaced

BATCHES = (16, 16, 16, 8)


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    with connect("mpi") as comm:
        assert comm.size == int(os.environ["SUITE_RANKS"])
        yield comm


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def samples(step: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """The batch of a rank at a step: any rank can compute that of any other."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, :3].argmax(1) + rank) % 3


def train_step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(module(batch[0]), batch[1]).backward()
    optimizer.step()


def bits(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    digest = xxhash.xxh3_64()
    for tensor in module.state_dict().values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    for state in optimizer.state.values() if optimizer else ():
        for value in state.values():
            if torch.is_tensor(value) and value.dim():
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def assert_same_bits(
    comm: Communicator, module: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    assert len(set(comm.allgather(bits(module, optimizer)))) == 1


def test_period_one_is_one_process_with_the_whole_batch(comm: Communicator) -> None:
    """k = 1, Nesterov momentum, averaged: the ranks together are one process with the p-fold batch."""
    mine, whole = model(), model()
    optimizer, reference = sgd(mine), sgd(whole)
    averager = Averager(mine, optimizer, comm, period=1)
    for step in range(50):
        train_step(mine, optimizer, samples(step, comm.rank, 16))
        assert averager.step(16) is True
        batches = [samples(step, r, 16) for r in range(comm.size)]
        train_step(whole, reference, (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
    for ours, theirs in zip(mine.parameters(), whole.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-10
    assert_same_bits(comm, mine, optimizer)


def test_uneven_batches_are_weighted_by_their_samples(comm: Communicator) -> None:
    """k = 10 and batches of 16, 16, 16, 8, against the weighted mean written out for all ranks here."""
    mine = model()
    optimizer = sgd(mine)
    averager = Averager(mine, optimizer, comm, period=10)
    replicas = [model() for _ in range(comm.size)]
    optimizers = [sgd(r) for r in replicas]
    counts = BATCHES[-comm.size :]
    shares = torch.tensor(counts) / sum(counts)
    for step in range(50):
        train_step(mine, optimizer, samples(step, comm.rank, counts[comm.rank]))
        assert averager.step(counts[comm.rank]) is (step % 10 == 9)
        for rank, (replica, opt) in enumerate(zip(replicas, optimizers, strict=True)):
            train_step(replica, opt, samples(step, rank, counts[rank]))
        if step % 10 == 9:
            weighted_mean_in_place(replicas, optimizers, shares)
    for ours, theirs in zip(mine.parameters(), replicas[0].parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-10
    assert_same_bits(comm, mine, optimizer)


@torch.no_grad()
def weighted_mean_in_place(
    replicas: list[nn.Module], optimizers: list[torch.optim.Optimizer], shares: Tensor
) -> None:
    for same in zip(*(r.parameters() for r in replicas), strict=True):
        momenta = [o.state[p]["momentum_buffer"] for o, p in zip(optimizers, same, strict=True)]
        for tensors in (same, momenta):
            mean = sum(s * t for s, t in zip(shares, tensors, strict=True))
            for tensor in tensors:
                tensor.copy_(mean)


class Odd(nn.Module):
    """Tied weights, batch norm, a frozen layer, an unused parameter, channels_last, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 6)
        self.frozen.requires_grad_(False)
        self.encode = nn.Linear(6, 5, bias=False)
        self.decode = nn.Linear(6, 5, bias=False)
        self.decode.weight = self.encode.weight
        self.unused = nn.Parameter(torch.ones(7))
        self.single = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        x = self.frozen(self.norm(self.convolution(images)).mean((2, 3)))
        return self.encode(x) + self.decode(x).relu() * self.single.sum().double()


def odd_step(module: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + comm.rank)
    optimizer.zero_grad()
    module(torch.randn(5, 3, 8, 8, generator=generator)).pow(2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
def test_an_unusual_model_is_bit_identical_after_every_average(comm: Communicator, name: str) -> None:
    torch.manual_seed(comm.rank)  # every rank begins with parameters of its own
    module = Odd()
    optimizer = getattr(torch.optim, name)([p for p in module.parameters() if p.requires_grad], lr=0.01)
    averager = Averager(module, optimizer, comm, period=3, check_every=1)
    assert_same_bits(comm, module, optimizer)
    frozen = module.frozen.weight.clone()
    for step in range(12):
        odd_step(module, optimizer, comm, step)
        if averager.step(5):
            assert_same_bits(comm, module, optimizer)
    assert averager.rounds == 4
    assert module.decode.weight is module.encode.weight
    assert module.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.frozen.weight, frozen)
    assert int(module.norm.num_batches_tracked) == 12
    assert len(set(comm.allgather(float(module.norm.running_mean[0])))) == 1


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_optimizer_state_may_be_kept_or_reset(comm: Communicator, policy: str) -> None:
    mine = model()
    optimizer = sgd(mine)
    averager = Averager(mine, optimizer, comm, period=2, optimizer_state=policy)
    for step in range(4):
        train_step(mine, optimizer, samples(step, comm.rank, 8))
        averager.step(8)
    assert_same_bits(comm, mine)
    if policy == "reset":
        assert not optimizer.state
    else:
        momentum = optimizer.state[next(iter(mine.parameters()))]["momentum_buffer"]
        assert len(set(comm.allgather(float(momentum.sum())))) == comm.size


def test_batch_norm_may_be_kept(comm: Communicator) -> None:
    module = Odd()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    averager = Averager(module, optimizer, comm, period=1, batch_norm="keep")
    odd_step(module, optimizer, comm, 1)
    averager.step(5)
    assert len(set(comm.allgather(float(module.norm.running_mean[0])))) == comm.size
    assert len(set(comm.allgather(float(module.norm.weight.detach()[0])))) == 1


@pytest.mark.parametrize("policy", ["average", "keep"])
def test_a_rank_that_is_not_finite_takes_the_mean_of_the_others(comm: Communicator, policy: str) -> None:
    mine = model()
    optimizer = sgd(mine)
    averager = Averager(mine, optimizer, comm, period=1, optimizer_state=policy)
    train_step(mine, optimizer, samples(0, comm.rank, 8))
    if comm.rank == 1:
        with torch.no_grad():
            mine[0].weight[0, 0] = float("nan")
            optimizer.state[mine[0].weight]["momentum_buffer"][1, 1] = float("inf")
    averager.step(8)
    assert all(p.isfinite().all() for p in mine.parameters())
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert all(t.isfinite().all() for t in states)
    assert_same_bits(comm, mine)


def test_if_no_rank_is_finite_all_keep_the_last_good_parameters(comm: Communicator) -> None:
    mine = model()
    averager = Averager(mine, sgd(mine), comm, period=1)
    before = copy.deepcopy(mine.state_dict())
    with torch.no_grad():
        mine[0].weight.fill_(float("inf"))
    averager.step(8)
    assert all(torch.equal(before[k], v) for k, v in mine.state_dict().items())


def test_a_rank_without_samples_receives_the_mean(comm: Communicator) -> None:
    mine = model()
    averager = Averager(mine, sgd(mine), comm, period=1)
    with torch.no_grad():
        mine[0].bias.fill_(float(comm.rank))
    averager.step(0 if comm.rank == 0 else 4)
    expected = sum(range(1, comm.size)) / (comm.size - 1)
    torch.testing.assert_close(mine[0].bias, torch.full_like(mine[0].bias, expected))


def test_drift_is_the_mean_squared_distance_from_the_mean(comm: Communicator) -> None:
    mine = model()
    state = FlatState(mine, sgd(mine), comm)
    average = StateAverage(state, comm)
    average.start()
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(0.01 * (comm.rank + 1) ** 2)
    weights = [float(r + 1) for r in range(comm.size)]
    numel = sum(p.numel() for p in mine.parameters())
    found = average.inspect(distance=True, verify=False)
    before = exchange(comm, report(found, Work(samples=weights[comm.rank])))
    average.average(weights[comm.rank], healthy=True)
    after = exchange(comm, report(average.inspect(distance=False, verify=True), Work(samples=1)))
    shares = torch.tensor(weights) / sum(weights)
    offsets = torch.tensor([0.01 * (r + 1) ** 2 for r in range(comm.size)])
    expected = numel * float((shares * (offsets - (shares * offsets).sum()) ** 2).sum())
    assert drift(before, after["moved"]) == pytest.approx(expected, rel=1e-9)
    assert after.unlike() == []


def test_ranks_that_hold_other_bits_are_found(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = model()
    averager = Averager(mine, sgd(mine), comm, period=1, check_every=1)
    averager.step(1)
    average = comm.average

    def average_and_flip(*args: Any) -> bool:
        """What a faulty memory might do to one rank's copy."""
        result = average(*args)
        if comm.rank == comm.size - 1:
            args[0].live[3] = torch.nextafter(args[0].live[3], torch.tensor(9.0))
        return result

    monkeypatch.setattr(comm, "average", average_and_flip)
    averager.step(1)
    with pytest.raises(BitsDiffer, match=rf"ranks \[{comm.size - 1}\] did not hold the same bits as rank 0"):
        averager.step(1)


def test_models_that_differ_are_named(comm: Communicator) -> None:
    odd = nn.Linear(4, 2 if comm.rank == 1 else 3)
    with pytest.raises(
        RanksDisagree, match=r"rank 0 has `weight torch\.float64 \(3, 4\).*rank 1 has `weight .* \(2, 4\)"
    ):
        Averager(odd, sgd(odd), comm)


def test_a_replaced_parameter_is_named(comm: Communicator) -> None:
    mine = model()
    optimizer = sgd(mine)
    averager = Averager(mine, optimizer, comm, period=1)
    averager.step(1)
    mine[2].weight.data = mine[2].weight.data.clone()
    with pytest.raises(ViewReplaced, match=r"parameter `2\.weight` is no longer in the flat state"):
        averager.step(1)
    mine = model()
    optimizer = sgd(mine)
    averager = Averager(mine, optimizer, comm, period=1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ViewReplaced, match=r"optimizer state `0\.weight/momentum_buffer` was replaced"):
        averager.step(1)
    mine = model()
    mine[0].weight.requires_grad_(False)
    averager = Averager(mine, sgd(mine), comm, period=1)
    mine[2].weight.requires_grad_(False)
    averager.step(1)  # it may freeze
    mine[0].weight.requires_grad_(True)
    with pytest.raises(ViewReplaced, match=r"parameter `0\.weight` was unfrozen after"):
        averager.step(1)
