"""Rounds of equal time on ranks of unequal speed, in a real job: see test_time.py. How many local steps a
rank takes is what the clock gave; what follows from that is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train
from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.worker import steps_per_epoch
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import Config, SyncConfig
from hvd_train.config_file import embedded_config
from hvd_train.run.replay import periods_of
from hvd_train.tasks.base import Batch
from hvd_train.tasks.built_in import Classification
from tests.mpi.jobs import events

ROUNDS = 12
RANKS = 4
COUNTS = (16, 16, 16, 8)
"""The batch of each rank."""


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    with connect("mpi") as comm:
        assert comm.size == RANKS
        yield comm


@pytest.fixture
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def local_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, slow: int) -> None:
    """One local step, with the gradient computed so many times: any rank can do that of any other."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(COUNTS[rank], 6, generator=generator)
    targets = (inputs[:, :3].argmax(1) + rank // 3) % 3
    for _ in range(slow):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
    optimizer.step()


class Reference:
    """The same training in one process, with a model for each rank and plain means of all tensors."""

    def __init__(self, rounds: Sequence[Sequence[int]]) -> None:
        self.models = [model() for _ in COUNTS]
        self.optimizers = [sgd(m) for m in self.models]
        done = [0] * RANKS
        for steps in rounds:
            for rank, k in enumerate(steps):
                for step in range(done[rank], done[rank] + k):
                    local_step(self.models[rank], self.optimizers[rank], step, rank, 1)
                done[rank] += k
            self.average([k * count for k, count in zip(steps, COUNTS, strict=True)])

    @torch.no_grad()
    def average(self, samples: Sequence[int]) -> None:
        for same in zip(*(m.parameters() for m in self.models), strict=True):
            momenta = [o.state[p]["momentum_buffer"] for o, p in zip(self.optimizers, same, strict=True)]
            for tensors in (same, momenta):
                mean = sum(n * t for n, t in zip(samples, tensors, strict=True)) / sum(samples)
                for tensor in tensors:
                    tensor.copy_(mean)


class Ours:
    """Through `Averager`, on this rank.

    Args:
        saved: what `state` gave, where the training goes on.
    """

    def __init__(self, comm: Communicator, saved: dict[str, Any] | None = None) -> None:
        self.comm = comm
        self.model = model()
        self.optimizer = sgd(self.model)
        self.steps, resume = 0, []
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.steps, resume = saved["steps"], [json.loads(saved["averager"])] * comm.size
        period = hvd_train.TimePeriod(0.02)
        self.averager = Averager(self.model, self.optimizer, comm, period, check_every=3, resume=resume)

    def run(self, rounds: int) -> list[list[int]]:
        """Trains until so many rounds are done; returns the local steps of every rank in each."""
        found: list[list[int]] = []
        before = self.steps
        while self.averager.rounds < rounds:
            local_step(self.model, self.optimizer, self.steps, self.comm.rank, 1 + 2 * self.comm.rank)
            self.steps += 1
            if self.averager.step(COUNTS[self.comm.rank]):
                found.append(self.comm.allgather(self.steps - before))
                before = self.steps
        self.averager.finish()  # none are left
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "averager": json.dumps(self.averager.state_dict()),
        }


@pytest.mark.usefixtures("_double_precision")
def test_it_is_the_training_of_one_process(comm: Communicator) -> None:
    """Resumed in the middle."""
    ours = Ours(comm)
    rounds = ours.run(ROUNDS // 2)
    ours = Ours(comm, ours.state())
    rounds += ours.run(ROUNDS)
    assert all(min(steps) >= 1 for steps in rounds)
    assert ours.averager.period is None
    parameters: list[Tensor] = comm.broadcast([*Reference(rounds).models[0].parameters()])
    for a, b in zip(ours.model.parameters(), parameters, strict=True):
        assert (a - b).abs().max() < 1e-10


class Unequal(Classification):
    """The built-in task; rank r computes every loss r times more."""

    def __init__(self, config: Config, rank: int) -> None:
        super().__init__(config.model)
        self.rank = rank

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        for _ in range(self.rank):
            super().loss(model, batch)[0].backward()
            model.zero_grad()
        return super().loss(model, batch)


DIGITS = embedded_config()
DIGITS = replace(
    DIGITS,
    threads=1,
    model=replace(DIGITS.model, hidden=(8,)),
    evaluate=replace(DIGITS.evaluate, every_rounds=50),
    sync=SyncConfig(schedule="time", seconds=0.03),
    stop=replace(DIGITS.stop, patience=0, max_rounds=18),
    checkpoint=replace(DIGITS.checkpoint, every_rounds=9, keep=9),
)


def weights(folder: Path, rounds: int) -> bytes:
    return (folder / "checkpoints" / f"round-{rounds}" / "model.safetensors").read_bytes()


@pytest.fixture
def runs(comm: Communicator, tmp_path: Path) -> str:
    """One folder for all ranks."""
    return str(comm.broadcast(tmp_path))


def train(comm: Communicator, config: Config, stops: Sequence[int]) -> Path:
    """Trains to each of these rounds, one start after the other."""
    for start, rounds in enumerate(stops):
        stop = replace(config.stop, max_rounds=rounds)
        again = replace(config, resume="auto" if start else "", stop=stop)
        hvd_train.train(again, Unequal(config, comm.rank), comm)
    return Path(config.runs) / config.name


def test_a_run_is_replayed_to_the_bit(comm: Communicator, runs: str) -> None:
    """The run was interrupted, its replay is not; and a replay that is."""
    first = train(comm, replace(DIGITS, runs=runs, name="first"), (7, 18))
    again = SyncConfig(replay_periods=str(first))
    whole = train(comm, replace(DIGITS, runs=runs, name="whole", sync=again), (18,))
    parts = train(comm, replace(DIGITS, runs=runs, name="parts", sync=again), (8, 18))
    periods = periods_of(str(first), RANKS)
    assert all(isinstance(k, tuple) and len(k) == RANKS for _, k in periods)
    for other in (whole, parts):
        assert periods_of(str(other), RANKS) == periods
        assert weights(other, 18) == weights(first, 18)
        assert [e["passes"] for e in events(other, "stop")][-1] == events(first, "stop")[-1]["passes"]


def test_the_log_says_how_often_the_rows_of_each_rank_have_counted(comm: Communicator, runs: str) -> None:
    folder = train(comm, replace(DIGITS, runs=runs, name="run"), (18,))
    steps = [of_ranks for event in events(folder, "round") for of_ranks in event["steps"]]
    (start,), (stop,) = events(folder, "header"), events(folder, "stop")
    rows, last = start["samples_per_rank"], events(folder, "round")[-1]
    size = start["batch_size"]
    assert len(steps) == 18
    taken = [sum(of_ranks) for of_ranks in zip(*steps, strict=True)]
    passes = [n / steps_per_epoch([of_rank], size, 1) for n, of_rank in zip(taken, rows, strict=True)]
    assert stop["passes"] == pytest.approx(passes)
    assert last["epoch"] == pytest.approx(
        sum(n * of_rank for n, of_rank in zip(stop["passes"], rows, strict=True)) / sum(rows)
    )
