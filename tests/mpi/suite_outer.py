"""Outer optimizers, clipping and outliers on every rank of a real job, against a plain reference: see
test_outer.py. The reference is one process with a copy of the model for each rank, written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.outer import Nesterov, SlowMo
from hvd_train.algorithm.outliers import Outliers
from hvd_train.comm.base import Communicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.config import LearningRateConfig
from tests.mpi.suite_averaging import assert_same_bits, samples

ROUNDS, HALF, STEPS = 30, 15, 3
COUNTS = (16, 16, 12, 8)
CLIP = 0.25
WEIGHTLESS = {(17, 2), (23, 1)}
"""(round, rank) in which a rank moves far away."""

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "slowmo": lambda: {"outer": SlowMo(lr=0.9, momentum=0.6)},
    "nesterov": lambda: {
        "outer": Nesterov(
            lr=0.7,
            momentum=0.9,
            schedule=LearningRateConfig(schedule="cosine", warmup=4, total=25, floor=0.1),
        )
    },
    "clip": lambda: {"clip": CLIP},
    "drop": lambda: {"outliers": Outliers("drop", decay=0.9, warmup=5)},
    "weigh": lambda: {"outliers": Outliers("weigh", decay=0.9, warmup=5)},
    "all": lambda: {
        "outer": Nesterov(lr=0.5, momentum=0.8),
        "clip": CLIP,
        "outliers": Outliers("drop", decay=0.9, warmup=5),
    },
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


def adam(module: nn.Module) -> torch.optim.Optimizer:
    # A small epsilon would amplify the rounding of gradients that are nearly 0.
    return torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-3)


def local_lr(round_: int) -> float:
    return 0.01 * (1 + math.cos(round_ / 9)) / 2


def local_steps(module: nn.Module, optimizer: torch.optim.Optimizer, round_: int, rank: int) -> None:
    optimizer.param_groups[0]["lr"] = local_lr(round_)
    for step in range(STEPS):
        inputs, targets = samples(STEPS * round_ + step, rank, COUNTS[rank])
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    if (round_, rank) in WEIGHTLESS:
        with torch.no_grad():
            for i, p in enumerate(module.parameters()):
                p.add_(torch.sin(torch.arange(p.numel()) + i).view_as(p))


class Reference:
    """All ranks in one process."""

    def __init__(self, case: str, size: int) -> None:
        self.case = case
        self.replicas = [model() for _ in range(size)]
        self.optimizers = [adam(r) for r in self.replicas]
        self.x = [p.detach().clone() for p in self.replicas[0].parameters()]
        self.u = [torch.zeros_like(p) for p in self.x]
        self.rounds, self.mean, self.variance = 0, 0.0, 0.0
        self.dropped: list[tuple[int, int]] = []

    def shrink(self, size: int) -> None:
        del self.replicas[size:], self.optimizers[size:]

    @torch.no_grad()
    def shares(self, round_: int) -> Tensor:
        weights = torch.tensor([float(c) for c in COUNTS[: len(self.replicas)]])
        if self.case not in ("drop", "weigh", "all"):
            return weights / weights.sum()
        norms = torch.stack(
            [
                torch.cat([(p - x).flatten() for p, x in zip(r.parameters(), self.x, strict=True)]).norm()
                for r in self.replicas
            ]
        )
        far = norms > self.mean + 3 * math.sqrt(self.variance)
        if self.rounds < 5 or 2 * far.sum() > len(norms):
            far = torch.zeros_like(far)
        self.dropped += [(round_, int(r)) for r in far.nonzero()]
        self.rounds += 1
        share = 0.1 / (1 - 0.9**self.rounds)
        kept = norms[~far]
        self.mean += share * (float(kept.mean()) - self.mean)
        self.variance += share * (float((kept - self.mean).square().mean()) - self.variance)
        weights = weights * torch.exp(-norms) if self.case == "weigh" else weights * ~far
        return weights / weights.sum()

    @torch.no_grad()
    def average(self, round_: int) -> None:
        shares = self.shares(round_)
        means = [
            sum(s * p for s, p in zip(shares, same, strict=True))
            for same in zip(*(r.parameters() for r in self.replicas), strict=True)
        ]
        self.x = self.move(round_, means)
        for r in self.replicas:
            for p, x in zip(r.parameters(), self.x, strict=True):
                p.copy_(x)
        others = [[b for b in r.buffers() if b.is_floating_point()] for r in self.replicas]
        for o, of in zip(self.optimizers, others, strict=True):
            of += [s[key] for s in o.state.values() for key in ("exp_avg", "exp_avg_sq")]
        for same in zip(*others, strict=True):
            mean = sum(s * t for s, t in zip(shares, same, strict=True))
            for tensor in same:
                tensor.copy_(mean)

    def move(self, round_: int, means: list[Tensor]) -> list[Tensor]:
        if self.case in ("clip", "all"):
            norm = math.sqrt(sum(float((m - x).square().sum()) for m, x in zip(means, self.x, strict=True)))
            by = min(1.0, CLIP / norm)
            means = [x + by * (m - x) for m, x in zip(means, self.x, strict=True)]
        g = [x - m for m, x in zip(means, self.x, strict=True)]
        if self.case == "slowmo":
            gamma = local_lr(round_)
            self.u = [0.6 * u + d / gamma for u, d in zip(self.u, g, strict=True)]
            return [x - 0.9 * gamma * u for x, u in zip(self.x, self.u, strict=True)]
        if self.case in ("nesterov", "all"):
            lr, mu = (0.5, 0.8) if self.case == "all" else (0.7 * cosine(round_), 0.9)
            self.u = [mu * u + d for u, d in zip(self.u, g, strict=True)]
            return [x - lr * (d + mu * u) for x, d, u in zip(self.x, g, self.u, strict=True)]
        return means

    def run(self, rounds: range) -> None:
        for round_ in rounds:
            for rank, (replica, optimizer) in enumerate(zip(self.replicas, self.optimizers, strict=True)):
                local_steps(replica, optimizer, round_, rank)
            self.average(round_)


def cosine(round_: int) -> float:
    done = min(1.0, max(0, round_ - 4) / 21)
    return min(1.0, (round_ + 1) / 4) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def run(comm: Communicator, case: str, rounds: range, start: list[Any] | None = None) -> dict[str, Any]:
    """The rounds of a run on all ranks of `comm`; the state of this rank at the end."""
    options = CASES[case]()
    module = model()
    optimizer = adam(module)
    if start is not None:
        module.load_state_dict(start[0]["model"])
        optimizer.load_state_dict(copy.deepcopy(start[0]["optimizer"]))
        options["resume"] = [of["averager"] for of in start]
    averager = Averager(module, optimizer, comm, period=STEPS, check_every=1, **options)
    for round_ in rounds:
        local_steps(module, optimizer, round_, comm.rank)
        for _ in range(STEPS):
            averager.step(COUNTS[comm.rank])
    assert_same_bits(comm, module, optimizer)
    return copy.deepcopy(
        {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "averager": averager.state_dict(),
        }
    )


def assert_close(found: dict[str, Any], reference: Reference) -> None:
    expected = reference.replicas[0].state_dict()
    for name, value in found["model"].items():
        assert (value - expected[name]).abs().max() < 1e-10, name
    for key, theirs in reference.optimizers[0].state_dict()["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            ours = found["optimizer"]["state"][key][moment]
            assert (ours - theirs[moment]).abs().max() < 1e-10, (key, moment)


@pytest.mark.parametrize("case", CASES)
def test_thirty_rounds_are_those_of_one_process_also_resumed(
    comm: Communicator, pair: Communicator | None, case: str
) -> None:
    """At once; interrupted after half of them; and gone on with by two of the four ranks."""
    reference = Reference(case, comm.size)
    reference.run(range(HALF))
    half = comm.allgather(run(comm, case, range(HALF)))
    assert_close(half[comm.rank], reference)
    fewer = copy.deepcopy(reference)
    reference.run(range(HALF, ROUNDS))
    whole = run(comm, case, range(ROUNDS))
    assert_close(whole, reference)
    resumed = run(comm, case, range(HALF, ROUNDS), half)
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for name, value in whole["averager"]["outer"].items():
        assert torch.equal(value, resumed["averager"]["outer"][name]) if torch.is_tensor(value) else True
    assert whole["averager"]["outliers"] == resumed["averager"]["outliers"]
    if case in ("drop", "all"):
        assert set(reference.dropped) >= WEIGHTLESS
    if pair is not None:
        fewer.shrink(2)
        fewer.run(range(HALF, ROUNDS))
        assert_close(run(pair, case, range(HALF, ROUNDS), half), fewer)
    comm.barrier()
