"""The same training by torch's averagers, by its DistributedDataParallel and by `Averager`, on every rank of
a real job: see test_peers.py. Every case compares the parameters of this rank after every local step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.period.given import WarmupPeriod
from hvd_train.algorithm.period.replayed import ReplayedPeriods
from hvd_train.comm.base import Communicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from tests.mpi.suite_averaging import samples

RANKS, STEPS, BATCH = 4, 40, 12
PERIOD, WARMUP = 4, 6
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def world() -> Iterator[MPICommunicator]:
    with MPICommunicator() as comm:
        assert comm.size == RANKS
        store = dist.FileStore(os.environ["PEERS_STORE"], RANKS)
        dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=RANKS)
        yield comm
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=["mpi", "ring"])
def comm(request: pytest.FixtureRequest, world: MPICommunicator) -> Communicator:
    return world if request.param == "mpi" else RingCommunicator(world)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def plain(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adam(module: nn.Module) -> torch.optim.Optimizer:
    # A small epsilon would amplify the rounding of gradients that are nearly 0.
    return torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-3)


def train(
    rank: int, module: nn.Module, step: Callable[[], Any], zero_grad: Callable[[], None]
) -> list[Tensor]:
    """The parameters of this rank after each of the local steps."""
    found = []
    for number in range(STEPS):
        inputs, targets = samples(number, rank, BATCH)
        zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        step()
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return found


def averager_of_torch(rank: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    """Only the parameters are averaged; before the warm-up ends nothing is."""
    module = model()
    optimizer = make(module)
    averager = PeriodicModelAverager(PERIOD, WARMUP)

    def step() -> None:
        optimizer.step()
        averager.average_parameters(module.parameters())

    return train(rank, module, step, optimizer.zero_grad)


def post_local_sgd_of_torch(rank: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    """In the warm-up DistributedDataParallel averages the gradients."""
    module = DistributedDataParallel(model())
    state = PostLocalSGDState(None, None, WARMUP, post_local_gradient_allreduce=False)
    module.register_comm_hook(state, post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(make(module), PeriodicModelAverager(PERIOD, WARMUP))
    return train(rank, module, optimizer.step, optimizer.zero_grad)


def data_parallel_of_torch(rank: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
    module = DistributedDataParallel(model())
    optimizer = make(module)
    return train(rank, module, optimizer.step, optimizer.zero_grad)


@dataclass(frozen=True)
class Case:
    """A training by torch's means, and the options of `Averager` that give the same."""

    by_torch: Callable[[int, Callable[[nn.Module], torch.optim.Optimizer]], list[Tensor]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)


# torch counts from the end of the warm-up, and averages after the first step that follows it.
LATE = ReplayedPeriods("torch", [(1, WARMUP + 1), (STEPS, PERIOD)])
KEPT = {"period": LATE, "optimizer_state": "keep"}
CASES = {
    "periodic": Case(averager_of_torch, plain, {"period": LATE}),
    "periodic, momentum kept": Case(averager_of_torch, momentum, KEPT),
    "periodic, moments kept": Case(averager_of_torch, adam, KEPT),
    "post-local SGD": Case(
        post_local_sgd_of_torch, plain, {"period": WarmupPeriod(PERIOD, rounds=WARMUP + 1)}
    ),
    "every step": Case(data_parallel_of_torch, momentum, {"period": 1}),
}


def ours(comm: Communicator, case: Case, **other: Any) -> list[Tensor]:
    module = model()
    optimizer = case.optimizer(module)
    averager = Averager(module, optimizer, comm, **{**case.options, **other})

    def step() -> None:
        optimizer.step()
        averager.step(BATCH)

    return train(comm.rank, module, step, optimizer.zero_grad)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs) == STEPS
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_torch(comm: Communicator, name: str) -> None:
    case = CASES[name]
    theirs = case.by_torch(comm.rank, case.optimizer)
    assert difference(ours(comm, case), theirs) < TOLERANCE
    # Otherwise no average might have been seen: with another period the parameters are others.
    assert difference(ours(comm, case, period=PERIOD + 1), theirs) > 1e4 * TOLERANCE
