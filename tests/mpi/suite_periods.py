"""Schedules of the period on every rank of a real job: see test_periods.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train
from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.period.base import Period
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import LearningRateConfig, SyncConfig
from hvd_train.config_file import embedded_config
from hvd_train.run.replay import periods_of

ROUNDS = 30
RANKS = 4


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
    return torch.optim.SGD(module.parameters(), lr=rate(0), momentum=0.9, nesterov=True)


def rate(steps: int) -> float:
    """The learning rate after so many local steps: halved now and then, and constant for long enough that
    adacomm uses both of its rules."""
    return float(0.2 * 0.5 ** (steps // 70))


def samples(step: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
    """The batch of a rank at a step: any rank can compute that of any other."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, :3].argmax(1) + rank // 3) % 3


def local_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, count: int
) -> float:
    """One local step and the rate of the next; returns the mean loss."""
    inputs, targets = samples(step, rank, count)
    optimizer.zero_grad()
    loss = F.cross_entropy(module(inputs), targets)
    loss.backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate(step + 1)
    return float(loss.detach())


class Reference:
    """The same training in one process: a model for each rank, and plain means of all tensors.

    Args:
        counts: the batch of each rank.
        following: k of the next round from what one process sees of the rounds so far.
    """

    def __init__(self, counts: Sequence[int], following: Callable[[Reference], int]) -> None:
        self.counts = counts
        self.models = [model() for _ in counts]
        self.optimizers = [sgd(m) for m in self.models]
        self.steps = 0
        self.periods: list[int] = []
        self.losses: list[float] = []
        """Mean loss of each round."""
        self.drifts: list[float] = []
        """Of each round."""
        while len(self.periods) < ROUNDS:
            self.run_round(following(self))

    def run_round(self, k: int) -> None:
        total = 0.0
        for step in range(self.steps, self.steps + k):
            for rank, count in enumerate(self.counts):
                loss = local_step(self.models[rank], self.optimizers[rank], step, rank, count)
                total += loss * count
        self.steps += k
        self.periods.append(k)
        self.losses.append(total / (k * sum(self.counts)))
        self.drifts.append(self.average())

    @torch.no_grad()
    def average(self) -> float:
        """Sets all models and momenta to their weighted mean; returns the drift, to which the momenta count:
        they are averaged as well."""
        shares = [count / sum(self.counts) for count in self.counts]
        drift = 0.0
        for same in zip(*(m.parameters() for m in self.models), strict=True):
            momenta = [o.state[p]["momentum_buffer"] for o, p in zip(self.optimizers, same, strict=True)]
            for tensors in (same, momenta):
                mean = sum(s * t for s, t in zip(shares, tensors, strict=True))
                drift += sum(s * float((t - mean).pow(2).sum()) for s, t in zip(shares, tensors, strict=True))
                for tensor in tensors:
                    tensor.copy_(mean)
        return drift


def warmup(so_far: Reference) -> int:
    return 1 if len(so_far.periods) < 8 else 5


def qsr(so_far: Reference) -> int:
    return max(3, min(48, math.floor((0.4 / rate(so_far.steps)) ** 2)))


def adacomm(so_far: Reference) -> int:
    """tau_0 = 12, intervals of at least 30 local steps; written from the beginning in every round."""
    tau, began, interval_rate = 12, 0, rate(0)
    done = 0
    for i, k in enumerate(so_far.periods):
        done += k
        if sum(so_far.periods[began : i + 1]) < 30:
            continue
        steps = so_far.periods[began : i + 1]
        loss = sum(f * n for f, n in zip(so_far.losses[began : i + 1], steps, strict=True)) / sum(steps)
        wanted = math.ceil(math.sqrt(loss / so_far.losses[0] * rate(0) / rate(done)) * 12)
        if wanted >= tau and rate(done) == interval_rate:
            wanted = math.ceil(tau / 2)
        tau, began, interval_rate = min(wanted, 48), i + 1, rate(done)
    return tau


def drift(so_far: Reference) -> int:
    """Measured after every third round, from the first one on."""
    k = 4
    for i in range(0, len(so_far.periods), 3):
        k = so_far.periods[i]
        wanted = math.floor(k * min(2.0, math.sqrt(15.0 / so_far.drifts[i])))
        k = max(1, min(wanted, 48))
    return k


def fixed(so_far: Reference) -> int:
    return 5


EVEN, UNEVEN = (8, 8, 8, 8), (16, 16, 16, 8)
CASES: dict[str, tuple[Sequence[int], Callable[[Reference], int], Callable[[], int | Period]]] = {
    "fixed": (EVEN, fixed, lambda: 5),
    "weighted": (UNEVEN, fixed, lambda: 5),
    "warmup": (UNEVEN, warmup, lambda: hvd_train.WarmupPeriod(5, rounds=8)),
    "qsr": (UNEVEN, qsr, lambda: hvd_train.QsrPeriod(3, alpha=0.4, most=48)),
    "adacomm": (UNEVEN, adacomm, lambda: hvd_train.AdaCommPeriod(12, steps=30, most=48)),
    "drift": (UNEVEN, drift, lambda: hvd_train.DriftPeriod(4, bound=15.0, most=48)),
}


class Ours:
    """The same through `Averager`, on this rank.

    Args:
        saved: what `state` gave, where the training goes on.
    """

    def __init__(
        self, comm: Communicator, count: int, period: int | Period, saved: dict[str, Any] | None = None
    ) -> None:
        self.rank, self.count = comm.rank, count
        self.model = model()
        self.optimizer = sgd(self.model)
        self.steps, resume = 0, []
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.steps, resume = saved["steps"], [json.loads(saved["averager"])] * comm.size
        self.averager = Averager(self.model, self.optimizer, comm, period, check_every=3, resume=resume)

    def run(self, rounds: int) -> list[int]:
        """Trains until so many rounds are done; returns the k of each."""
        found: list[int] = []
        while self.averager.rounds < rounds:
            k = self.averager.period
            loss = local_step(self.model, self.optimizer, self.steps, self.rank, self.count)
            self.steps += 1
            if self.averager.step(self.count, loss):
                found.append(k)
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "averager": json.dumps(self.averager.state_dict()),
        }


@pytest.fixture(scope="module")
def references(comm: Communicator) -> dict[str, tuple[list[int], list[Tensor]]]:
    """The periods and the parameters of each case; each rank has computed some of the cases alone."""
    torch.set_default_dtype(torch.float64)
    mine = {}
    for i, (name, (counts, following, _)) in enumerate(CASES.items()):
        if i % comm.size == comm.rank:
            found = Reference(counts, following)
            mine[name] = (found.periods, [p.detach() for p in found.models[0].parameters()])
    torch.set_default_dtype(torch.float32)
    return {name: found for part in comm.allgather(mine) for name, found in part.items()}


@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_training_of_one_process(
    comm: Communicator, references: dict[str, tuple[list[int], list[Tensor]]], name: str
) -> None:
    """Whole, and resumed after a round that measures the drift, and after the next one."""
    counts, _, period = CASES[name]
    periods, parameters = references[name]
    if name not in ("fixed", "weighted"):
        assert len(set(periods)) > 1
    mine = counts[comm.rank]
    whole = Ours(comm, mine, period())
    found = {"whole": whole.run(ROUNDS)}
    parts = Ours(comm, mine, period())
    found["parts"] = parts.run(13)
    for rounds in (14, ROUNDS):
        parts = Ours(comm, mine, period(), parts.state())
        found["parts"] += parts.run(rounds)
    for ours, way in ((whole, "whole"), (parts, "parts")):
        assert found[way] == periods, way
        for a, b in zip(ours.model.parameters(), parameters, strict=True):
            assert (a - b).abs().max() < 1e-10, way


DIGITS = embedded_config()
DIGITS = replace(
    DIGITS,
    threads=1,
    model=replace(DIGITS.model, hidden=(8,)),
    learning_rate=LearningRateConfig(schedule="step", every=6, factor=0.5),
    evaluate=replace(DIGITS.evaluate, every_rounds=50),
    stop=replace(DIGITS.stop, patience=0, max_rounds=18),
    checkpoint=replace(DIGITS.checkpoint, every_rounds=9, keep=9),
)
RUNS = {
    "warmup": SyncConfig(period=4, schedule="warmup", warmup_rounds=6),
    "warmup with rules": SyncConfig(
        period=4,
        schedule="warmup",
        warmup_rounds=6,
        outer="nesterov",
        clip=0.5,
        ema=0.5,
        outliers="drop",
        outlier_warmup=2,
        optimizer_state="keep",
    ),
    "qsr": SyncConfig(period=4, schedule="qsr", qsr_alpha=0.15, max_period=20),
    "adacomm": SyncConfig(period=9, schedule="adacomm", adacomm_steps=25),
    "drift": SyncConfig(period=4, schedule="drift", drift_bound=0.5, check_every=2),
    "auto": SyncConfig(period=4, schedule="auto", target_share=0.3),
}


def weights(folder: Path, rounds: int) -> bytes:
    return (folder / "checkpoints" / f"round-{rounds}" / "model.safetensors").read_bytes()


def stretches_of(folder: Path) -> tuple[tuple[int, int], ...]:
    return periods_of(str(folder), RANKS)


@pytest.fixture
def runs(comm: Communicator, tmp_path: Path) -> str:
    """One folder for all ranks."""
    return str(comm.broadcast(tmp_path))


@pytest.mark.parametrize("name", ["warmup", "warmup with rules", "qsr", "adacomm", "drift"])
def test_a_resumed_run_is_the_uninterrupted_one(comm: Communicator, name: str, runs: str) -> None:
    """To the bit, stopped after some rounds: `warmup` within it and at its end; `drift` is measured in one of
    two."""
    config = replace(DIGITS, runs=runs, name="whole", sync=RUNS[name])
    hvd_train.train(config, comm=comm)
    for rounds in (3, 6, 8, 18) if "warmup" in name else (7, 8, 18):
        stop = replace(DIGITS.stop, max_rounds=rounds)
        hvd_train.train(replace(config, name="parts", resume="auto", stop=stop), comm=comm)
    whole, parts = Path(runs) / "whole", Path(runs) / "parts"
    assert stretches_of(parts) == stretches_of(whole)
    assert len(stretches_of(whole)) > 1
    assert weights(parts, 18) == weights(whole, 18)


@pytest.mark.parametrize("name", ["drift", "auto"])
def test_replayed_periods_give_the_same_bits(comm: Communicator, name: str, runs: str) -> None:
    """`auto` chooses by the time that it measures: no two runs need have the same periods."""
    stop = replace(DIGITS.stop, max_rounds=45)
    config = replace(DIGITS, runs=runs, name="first", sync=RUNS[name], stop=stop)
    hvd_train.train(config, comm=comm)
    again = replace(config.sync, replay_periods=f"{runs}/first")
    hvd_train.train(replace(config, name="again", sync=again), comm=comm)
    first, second = Path(runs) / "first", Path(runs) / "again"
    assert stretches_of(second) == stretches_of(first)
    assert weights(second, 45) == weights(first, 45)
