"""States with policies and periods of their own on every rank of a real job, against a plain reference: see
test_states.py. The reference is one process with a copy of the model for each rank, written out here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.batch_norm import update_batch_norm
from hvd_train.algorithm.outer import Nesterov
from hvd_train.comm import ring
from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.comm.ring_hosts import Hosts
from tests.mpi.suite_averaging import assert_same_bits, samples

ROUNDS, HALF, STEPS = 30, 17, 3
"""After `HALF` rounds no state with a period of its own is due."""
COUNTS = (16, 16, 12, 8)
DES_LOC = {"exp_avg": 3, "exp_avg_sq": 6, "buffers": 2}

CASES: dict[str, dict[str, Any]] = {
    "des-loc": {"every_rounds": DES_LOC},
    "outer": {"every_rounds": DES_LOC, "outer": Nesterov(lr=0.7, momentum=0.6)},
    "keep": {"every_rounds": {"exp_avg": 3}, "moments": {"exp_avg_sq": "keep"}},
    "reset": {"every_rounds": {"buffers": 2}, "moments": {"exp_avg": "reset"}},
    "only": {"optimizer_state": "keep", "moments": {"exp_avg": "average"}, "batch_norm": "keep"},
}


@pytest.fixture(scope="module")
def world() -> Iterator[MPICommunicator]:
    with MPICommunicator() as comm:
        assert comm.size == len(COUNTS)
        yield comm


@pytest.fixture(scope="module", params=["mpi", "ring"])
def comm(request: pytest.FixtureRequest, world: MPICommunicator) -> Communicator:
    return world if request.param == "mpi" else RingCommunicator(world)


@pytest.fixture(scope="module")
def pair(world: MPICommunicator) -> Communicator | None:
    """The first two ranks, as a world of their own; None on the others."""
    part = world._comm.Split(int(world.rank >= 2), world.rank)
    return RingCommunicator(MPICommunicator(comm=part)) if world.rank < 2 else None


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.BatchNorm1d(20), nn.Linear(20, 3))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    # A small epsilon would amplify the rounding of gradients that are nearly 0.
    return torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-3)


def local_steps(module: nn.Module, optimizer: torch.optim.Optimizer, round_: int, rank: int) -> None:
    for step in range(STEPS):
        inputs, targets = samples(STEPS * round_ + step, rank, COUNTS[rank])
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()


class Reference:
    """All ranks in one process."""

    def __init__(self, case: str, size: int) -> None:
        self.options = CASES[case]
        self.replicas = [model() for _ in range(size)]
        self.optimizers = [adamw(r) for r in self.replicas]
        self.x = [p.detach().clone() for p in self.replicas[0].parameters()]
        self.u = [torch.zeros_like(p) for p in self.x]

    def shrink(self, size: int) -> None:
        del self.replicas[size:], self.optimizers[size:]

    def run(self, rounds: range) -> None:
        for round_ in rounds:
            for rank, (replica, optimizer) in enumerate(zip(self.replicas, self.optimizers, strict=True)):
                local_steps(replica, optimizer, round_, rank)
            self.average(round_ + 1)

    @torch.no_grad()
    def average(self, number: int) -> None:
        """The average of the round with this number, from 1."""
        weights = torch.tensor([float(c) for c in COUNTS[: len(self.replicas)]])
        self.shares = weights / weights.sum()
        every = self.options.get("every_rounds", {})
        means = [self.mean(same) for same in zip(*(r.parameters() for r in self.replicas), strict=True)]
        if "outer" in self.options:
            g = [x - m for x, m in zip(self.x, means, strict=True)]
            self.u = [0.6 * u + d for u, d in zip(self.u, g, strict=True)]
            means = [x - 0.7 * (d + 0.6 * u) for x, d, u in zip(self.x, g, self.u, strict=True)]
        self.x = means
        for r in self.replicas:
            for p, x in zip(r.parameters(), self.x, strict=True):
                p.copy_(x)
        if self.options.get("batch_norm") != "keep" and number % every.get("buffers", 1) == 0:
            buffers = ([b for b in r.buffers() if b.is_floating_point()] for r in self.replicas)
            self.set_to_mean(zip(*buffers, strict=True))
        for key in ("exp_avg", "exp_avg_sq"):
            same = zip(*([s[key] for s in o.state.values()] for o in self.optimizers), strict=True)
            otherwise = self.options.get("optimizer_state", "average")
            policy = self.options.get("moments", {}).get(key, otherwise)
            if policy == "reset":
                for tensor in (t for tensors in same for t in tensors):
                    tensor.zero_()
            elif policy == "average" and number % every.get(key, 1) == 0:
                self.set_to_mean(same)

    def mean(self, same: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([s * t for s, t in zip(self.shares, same, strict=True)]).sum(0)

    def set_to_mean(self, groups: Iterator[tuple[Tensor, ...]]) -> None:
        for same in groups:
            mean = self.mean(same)
            for tensor in same:
                tensor.copy_(mean)


def run(comm: Communicator, case: str, rounds: range, start: list[Any] | None = None) -> dict[str, Any]:
    """The rounds of a run on all ranks of `comm`; the state of this rank at the end."""
    options = dict(CASES[case])
    module = model()
    optimizer = adamw(module)
    if start is not None:
        mine = start[comm.rank % len(start)]
        module.load_state_dict(mine["model"])
        optimizer.load_state_dict(copy.deepcopy(mine["optimizer"]))
        options["resume"] = [of["averager"] for of in start]
    averager = Averager(module, optimizer, comm, period=STEPS, check_every=1, **options)
    for round_ in rounds:
        local_steps(module, optimizer, round_, comm.rank)
        for _ in range(STEPS):
            averager.step(COUNTS[comm.rank])
    found = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy({**found, "averager": averager.state_dict()})


def assert_close(found: dict[str, Any], reference: Reference, rank: int) -> None:
    for name, theirs in reference.replicas[rank].state_dict().items():
        assert (found["model"][name] - theirs).abs().max() < 1e-10, name
    for key, theirs in reference.optimizers[rank].state_dict()["state"].items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            ours = found["optimizer"]["state"][key][moment]
            assert (ours - theirs[moment]).abs().max() < 1e-10, (key, moment)


@pytest.mark.parametrize("case", CASES)
def test_thirty_rounds_are_those_of_one_process_also_resumed(
    comm: Communicator, pair: Communicator | None, case: str
) -> None:
    """At once; interrupted between two averages of the moments; and gone on with by two of the four ranks."""
    reference = Reference(case, comm.size)
    reference.run(range(HALF))
    half = comm.allgather(run(comm, case, range(HALF)))
    assert_close(half[comm.rank], reference, comm.rank)
    fewer = copy.deepcopy(reference)
    reference.run(range(HALF, ROUNDS))
    whole = run(comm, case, range(ROUNDS))
    assert_close(whole, reference, comm.rank)
    resumed = run(comm, case, range(HALF, ROUNDS), half)
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for key, values in whole["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, resumed["optimizer"]["state"][key][name]), (key, name)
    if pair is not None:
        fewer.shrink(2)
        fewer.run(range(HALF, ROUNDS))
        assert_close(run(pair, case, range(HALF, ROUNDS), half), fewer, pair.rank)
    comm.barrier()


def test_moments_between_two_averages_are_each_ranks_own(comm: Communicator) -> None:
    state = run(comm, "des-loc", range(HALF))["optimizer"]["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert len(set(comm.allgather(float(state[name].sum())))) == comm.size


@pytest.mark.parametrize("case", ["des-loc", "outer", "keep"])
def test_a_rank_that_is_not_finite_takes_the_others_mean_of_everything(comm: Communicator, case: str) -> None:
    """In a round in which no moment is due: parameters, moments and buffers."""
    module = model()
    optimizer = adamw(module)
    averager = Averager(module, optimizer, comm, period=STEPS, check_every=1, **CASES[case])
    for round_ in range(2):
        local_steps(module, optimizer, round_, comm.rank)
        if (round_, comm.rank) == (0, 1):
            optimizer.state[module[0].weight]["exp_avg"][1, 1] = float("inf")
            if case == "keep":
                optimizer.state[module[0].weight]["exp_avg_sq"][1, 1] = float("nan")
            module[2].running_mean[3] = float("nan")
        for _ in range(STEPS):
            averager.step(COUNTS[comm.rank])
        if round_ == 0:
            assert_same_bits(comm, module, optimizer if case != "keep" else None)
            anew = [not t.any() for s in optimizer.state.values() for t in s.values()]
            assert all(anew) if (case, comm.rank) == ("keep", 1) else not any(anew)
        tensors = [t for s in optimizer.state.values() for t in s.values()]
        assert all(t.isfinite().all() for t in (*tensors, *module.state_dict().values()))


class Counted:
    """Counts the bytes that are averaged, and those that leave this rank."""

    def __init__(self, comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.averaged = 0
        plain = comm.average

        def average(buffer: Buffer, *args: Any) -> bool:
            self.averaged += buffer.num_bytes
            return plain(buffer, *args)

        monkeypatch.setattr(comm, "average", average)
        self.comm = comm

    def of(self, **options: Any) -> tuple[int, int]:
        """Bytes of 6 rounds: averaged, and sent by all ranks. Every tensor fills whole cache lines, so that
        no buffer has gaps."""
        module = nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32, affine=False))
        optimizer = adamw(module)
        averager = Averager(module, optimizer, self.comm, period=1, **options)
        before, sent = self.averaged, self.comm.payload_bytes
        for _ in range(6):
            optimizer.zero_grad()
            module(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
            averager.step(4)
        sents = self.comm.allgather(0 if sent is None else self.comm.payload_bytes - sent)
        return self.averaged - before, sum(sents)


def test_what_is_not_due_is_not_sent(world: MPICommunicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the counters of two hosts, as which the ranks of this one appear: the bytes of each state in the
    rounds in which it is due, and no others."""
    pairs = Hosts([[0, 1], [2, 3]], world.rank // 2, world.rank % 2)
    with monkeypatch.context() as patched:
        patched.setattr(ring, "find_hosts", lambda _: pairs)
        comm = RingCommunicator(world)
    assert comm.num_hosts == 2
    count = Counted(comm, monkeypatch)
    weights, statistics = 16 * 32 * 8, 2 * 32 * 8
    every = {"exp_avg": 3, "exp_avg_sq": 6, "buffers": 2}
    all_of_it = (3 * weights + statistics) * 6
    some = weights * (6 + 2 + 1) + statistics * 3
    assert count.of()[0] == all_of_it
    averaged, sent = count.of(every_rounds=every)
    assert averaged == some
    # A ring of two hosts: each sends half of the bytes to be reduced, and half when they are gathered.
    assert sent == 2 * some
    assert count.of()[1] == 2 * all_of_it
    parameters = {"optimizer_state": "keep", "batch_norm": "keep"}
    assert count.of(**parameters) == (6 * weights, 12 * weights)
    momentum = {**parameters, "moments": {"exp_avg": "average"}}
    assert count.of(**momentum, every_rounds={"exp_avg": 3}) == (8 * weights, 16 * weights)


def test_batch_norm_of_all_ranks_is_that_of_one_process(comm: Communicator) -> None:
    """Mean and unbiased variance of all values, however the batches are dealt; one rank has none."""
    batches = [samples(i, 0, 8 + i % 3)[0] * (1 + i % 4) + i for i in range(7)]
    mine, joined = model(), model()
    before = mine.state_dict()["2.num_batches_tracked"].clone()
    own = batches[comm.rank :: comm.size - 1] if comm.rank < comm.size - 1 else []
    update_batch_norm(mine, own, comm)
    with torch.no_grad():
        values = joined[1](joined[0](torch.cat(batches)))
    assert (mine[2].running_mean - values.mean(0)).abs().max() < 1e-12
    assert (mine[2].running_var - values.var(0)).abs().max() < 1e-12
    assert torch.equal(mine.state_dict()["2.num_batches_tracked"], before)
    assert_same_bits(comm, mine)
