"""Rounds of averaged gradients before local SGD, on ranks that are threads: what is gathered and refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm import gathering
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Header, Work
from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, OptimConfig, SyncConfig
from hvd_train.data.format import SampleSpec
from hvd_train.errors import ConfigError, TaskError
from hvd_train.tasks.base import Batch, Task
from tests.threads import ThreadCommunicator, on_ranks

CLASSES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "AdamW": {"amsgrad": True},
    "NAdam": {},
    "RMSprop": {"centered": True},
    "Rprop": {},
    "ASGD": {"t0": 2.0},
    "Adagrad": {"initial_accumulator_value": 0.1},
}
WARM = SyncConfig(schedule="warmup", warmup_rounds=3, period=2, check_every=1)


class Fit(Task):
    """The mean square of what the model gives."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return (model(batch["x"]) - 1).abs().square().mean(), len(batch["x"])


class Odd(nn.Module):
    """Parameters of three types, in columns, complex, of no dimension, of no element, unused, and frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.columns = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3).t())
        self.complex = nn.Parameter(torch.complex(torch.linspace(0, 1, 5), torch.linspace(1, 0, 5)))
        self.wide = nn.Parameter(torch.linspace(0, 1, 5, dtype=torch.float64))
        self.short = nn.Parameter(torch.linspace(0, 1, 5, dtype=torch.bfloat16))
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x @ self.columns) * self.frozen * self.scale
        hidden = hidden + (hidden * self.complex).real
        return hidden * self.wide + hidden * self.short


def rows(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {"x": torch.randn(rank + 2, 3, generator=generator)}


class Trained:
    """Some rounds of one rank."""

    def __init__(self, comm: Communicator, optim: OptimConfig, sync: SyncConfig, model: nn.Module) -> None:
        self.comm, self.model = comm, model
        self.optimizer = make_optimizer(model, optim)
        self.parts = SyncParts(model, self.optimizer, comm, Config(optim=optim, sync=sync))
        self.step = self.parts.step(Gradients(model, Fit(), optim))
        self.synchronizer = self.parts.synchronizer()
        self.synchronizer.start()
        self.headers: list[Header] = []

    def run(self, rounds: range, steps: int = 1) -> None:
        for round_ in rounds:
            done = [self.step([rows(10 * round_ + n, self.comm.rank)]) for n in range(steps)]
            work = Work(samples=sum(d.samples for d in done), loss_sum=sum(d.loss_sum for d in done))
            self.headers.append(self.synchronizer.synchronize(round_, work))

    def sliced(self) -> dict[str, Any]:
        """What a checkpoint has of the slices."""
        return copy.deepcopy(self.parts.stateful()["sliced"].state_dict())

    def state(self) -> dict[str, Tensor]:
        """Of the whole optimizer, by `parameter/key`."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {
            f"{names[p]}/{key}": value.clone()
            for p, of in self.optimizer.state.items()
            for key, value in of.items()
        }


TRAINED = {"columns", "complex", "wide", "short", "scale", "empty", "unused", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("policy", ["average", "keep"])
@pytest.mark.parametrize("name", CLASSES)
def test_moments_and_counters_are_those_of_the_owners(
    name: str, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, on every rank, in messages of four elements at most. Put together here from what the ranks
    hold after the same steps where the warm-up goes on."""
    monkeypatch.setattr(gathering, "PIECE_BYTES", 16)
    optim, sync = OptimConfig(name=name, lr=0.01, args=CLASSES[name]), replace(WARM, optimizer_state=policy)

    def whole(comm: ThreadCommunicator) -> dict[str, Tensor]:
        trained = Trained(comm, optim, sync, Odd())
        trained.run(range(3))
        assert trained.sliced()["offsets"] == {}
        for buffer in trained.parts.flat.buffers.values():
            assert torch.equal(buffer.live, buffer.anchor)
            assert buffer.version == 5, "the start, three steps, and the average behind them"
        return trained.state()

    def pieces(comm: ThreadCommunicator) -> dict[str, Any]:
        trained = Trained(comm, optim, replace(sync, warmup_rounds=9), Odd())
        trained.run(range(3))
        return trained.sliced()

    gathered, owners = on_ranks(3, whole), on_ranks(3, pieces)
    for state in gathered:
        assert {key.rpartition("/")[0] for key in state} == TRAINED
        for full, value in state.items():
            parameter, _, key = full.rpartition("/")
            if parameter != "empty":
                assert torch.equal(value, _joined(owners, parameter, key, value)), full


def _joined(owners: list[dict[str, Any]], parameter: str, key: str, like: Tensor) -> Tensor:
    """The pieces of all owners, in the order of the parameter's memory, as the tensor that they are of."""
    found = [
        (of["offsets"][parameter], of[f"{key}/{parameter}"]) for of in owners if parameter in of["offsets"]
    ]
    if key in ("step", "mu_product", "eta", "mu"):
        return found[0][1]
    flat = torch.cat([values for _, values in sorted(found, key=lambda piece: piece[0])])
    if like.is_complex():
        return torch.view_as_complex(flat.view(*like.shape, 2))
    return (flat.view(5, 3).t() if parameter == "columns" else flat.view(like.shape)).to(like.dtype)


def test_what_is_reset_is_not_gathered() -> None:
    optim = OptimConfig(name="AdamW", lr=0.01)
    (state,) = on_ranks(1, lambda comm: _after(comm, optim, replace(WARM, optimizer_state="reset")))
    assert state == {}
    sync = replace(WARM, moments={"exp_avg": "reset"})
    (state,) = on_ranks(1, lambda comm: _after(comm, optim, sync))
    assert not state["columns/exp_avg"].any()
    assert state["columns/exp_avg_sq"].any()
    assert state["columns/step"] == 3


def _after(comm: Communicator, optim: OptimConfig, sync: SyncConfig) -> dict[str, Tensor]:
    trained = Trained(comm, optim, sync, Odd())
    trained.run(range(3))
    return trained.state()


def test_the_rules_begin_with_local_sgd() -> None:
    """Outer steps, outliers and drift. The steps of the warm-up are one round each."""
    sync = replace(WARM, outer="nesterov", outliers="drop")

    def of(comm: ThreadCommunicator) -> tuple[list[int], list[int], list[float | None]]:
        trained = Trained(comm, OptimConfig(lr=0.01), sync, Odd())
        outer, seen, drifts = [], [], []
        for round_ in range(6):
            trained.run(range(round_, round_ + 1), 1 if round_ < 3 else 2)
            outer.append(trained.parts.outer.steps)
            seen.append(trained.parts.outliers.state_dict()["rounds"])
            drifts.append(trained.synchronizer.drift)
        assert all(p.grad is not None for p in (trained.model.columns, trained.model.short))
        return outer, seen, drifts

    for outer, seen, drifts in on_ranks(2, of):
        assert outer == seen == [0, 0, 0, 1, 2, 3]
        assert drifts[:4] == [None] * 4
        assert all(isinstance(drift, float) for drift in drifts[4:])


def test_a_short_wire_carries_gradients_in_full() -> None:
    """And differences of parameters once they are averaged."""

    def of(comm: ThreadCommunicator) -> list[set[bool]]:
        trained = Trained(comm, OptimConfig(lr=0.01), replace(WARM, wire="bfloat16"), Odd())
        found = []
        for round_ in range(4):
            buffers = trained.parts.flat.buffers.items()
            found.append({buffer.in_full for part, buffer in buffers if part.parameters})
            trained.run(range(round_, round_ + 1))
        return found

    assert on_ranks(2, of) == [[{True}, {True}, {True}, {False}]] * 2


def test_what_a_warm_up_cannot_step_is_refused() -> None:
    def refused(optim: OptimConfig, model: nn.Module) -> str:
        with pytest.raises((ConfigError, TaskError)) as error:
            SyncParts(model, make_optimizer(model, optim), SoloCommunicator(), Config(optim=optim, sync=WARM))
        return str(error.value)

    message = refused(OptimConfig(name="Adafactor", lr=0.01), nn.Linear(3, 3))
    assert message.startswith("optim.name = 'Adafactor': sync.schedule = 'warmup' steps on slices of the")
    assert message.endswith("Choose one of these, or sync.schedule = 'fixed'.")
    message = refused(OptimConfig(lr=0.01, clip_norm=1.0), Odd())
    assert message.startswith(
        "optim.clip_norm = 1.0: the model has parameters of torch.float64 and torch.float32"
    )
    assert "one type after the other with sync.schedule = 'warmup'; expected" in message
