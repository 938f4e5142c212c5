"""Parameter groups: who is in which, and that a training with them is plain torch with the same groups."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.algorithm.schedule import LearningRate
from hvd_train.config import (
    Config,
    GroupConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
)
from hvd_train.data.format import SampleSpec
from hvd_train.errors import ConfigError
from hvd_train.record.reports import RoundReport
from hvd_train.tasks.base import Batch
from hvd_train.tasks.built_in import Classification
from tests.unit.trainings import resumed, small, train


class Net(nn.Module):
    """Parameters of every kind: matrices, biases, norms with vectors and with a matrix, one of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4))
        self.wide = nn.LayerNorm((1, 4))
        self.head = nn.Linear(4, 7)
        self.tied = self.head.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.wide(self.body(inputs / 240).unsqueeze(1)).squeeze(1))
        return outputs


def groups_of(config: OptimConfig, model: nn.Module | None = None) -> list[tuple[list[str], float, float]]:
    """The names of each group, its learning rate and its weight decay."""
    model = model or Net()
    names = {p: name for name, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    return [([names[p] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]


ADAM = OptimConfig(name="AdamW", lr=0.5, args={"weight_decay": 0.25})
MATRICES = ["tied", "body.0.weight", "body.3.weight"]
VECTORS = ["body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias"]
NORM = ["wide.weight", "wide.bias"]


def test_without_groups_there_is_one() -> None:
    ((names, lr, decay),) = groups_of(ADAM)
    assert (sorted(names), lr, decay) == (sorted([*MATRICES, *VECTORS, *NORM, "head.bias"]), 0.5, 0.25)


def test_norms_and_biases_can_be_without_decay() -> None:
    with_decay, without = groups_of(replace(ADAM, decay="matrices"))
    assert (with_decay[0], with_decay[2]) == (MATRICES, 0.25)
    assert (sorted(without[0]), without[2]) == (sorted([*VECTORS, *NORM, "head.bias"]), 0.0)


def test_the_first_pattern_that_fits_counts() -> None:
    groups = (
        GroupConfig(pattern="head.*", lr_factor=4.0),
        GroupConfig(pattern="*.bias", lr_factor=0.5, weight_decay=0.0),
        GroupConfig(pattern="body.?.weight", weight_decay=0.125),
    )
    assert groups_of(replace(ADAM, groups=groups)) == [
        (["wide.weight"], 0.5, 0.25),
        (["tied", "head.bias"], 2.0, 0.25),
        (["body.0.bias", "body.1.bias", "body.3.bias", "wide.bias"], 0.25, 0.0),
        (["body.0.weight", "body.1.weight", "body.3.weight"], 0.5, 0.125),
    ]
    decayed = groups_of(replace(ADAM, groups=groups[2:], decay="matrices"))
    assert decayed[2:] == [(["body.0.weight", "body.3.weight"], 0.5, 0.125), (["body.1.weight"], 0.5, 0.0)]


def test_a_group_that_can_have_no_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.groups\.pattern = 'haed\.\*': no .* near it head\.bias"):
        groups_of(replace(ADAM, groups=(GroupConfig(pattern="haed.*"),)))
    both = (GroupConfig(pattern="head.*"), GroupConfig(pattern="head.bias"))
    with pytest.raises(
        ConfigError, match=r"'head\.bias': every parameter that it fits is frozen or in a group"
    ):
        groups_of(replace(ADAM, groups=both))
    model = Net()
    model.body.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'body\.\*': every parameter that it fits is frozen"):
        groups_of(replace(ADAM, groups=(GroupConfig(pattern="body.*"),)), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "matrices"}, r"optim\.decay = 'matrices': torch\.optim\.SparseAdam has no weight decay"),
        ({"groups": (GroupConfig(pattern="*", weight_decay=0.0),)}, r"optim\.groups\.weight_decay: torch"),
    ],
)
def test_decay_needs_an_optimizer_that_has_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(Net(), OptimConfig(name="SparseAdam", **changes))


class Recorded(Classification):
    """Keeps the batches of the training."""

    def __init__(self) -> None:
        super().__init__(ModelConfig())
        self.batches: list[Batch] = []

    def build_model(self, spec: SampleSpec) -> nn.Module:
        super().build_model(spec)
        net = Net()
        self.begun = copy.deepcopy(net)
        return net

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if model.training:
            self.batches.append(batch)
        return super().loss(model, batch)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = small(tmp_path)
    groups = (GroupConfig(pattern="head.*", lr_factor=4.0, weight_decay=0.5), GroupConfig(pattern="wide.*"))
    return replace(
        config,
        optim=replace(ADAM, lr=0.01, groups=groups, decay="matrices"),
        learning_rate=LearningRateConfig(schedule="cosine", total=10, warmup=3),
        stop=StopConfig(patience=0, max_rounds=10),
    )


def by_hand(net: Any, batches: list[Batch], schedule: LearningRateConfig) -> dict[str, Tensor]:
    """The model after 10 rounds of 5 steps, by torch alone."""
    layers = {
        (0.01, 0.25): [net.body[0].weight, net.body[3].weight],
        (0.01, 0.0): [
            *(net.body[0].bias, net.body[1].weight, net.body[1].bias, net.body[3].bias),
            *net.wide.parameters(),
        ],
        (0.04, 0.5): [net.head.weight],
        (0.04, 0.0): [net.head.bias],
    }
    groups = [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in layers.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    rate = LearningRate(schedule, optimizer)
    for i, batch in enumerate(batches):
        rate.apply(i // 5, samples=0)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batch["inputs"]), batch["targets"].long()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.parametrize("stops", [(10,), (4, 10)])
def test_a_training_is_plain_torch_with_the_same_groups(stops: tuple[int, ...], config: Config) -> None:
    """Also resumed in the middle."""
    task = Recorded()
    for stop in stops:
        one = resumed(config, max_rounds=stop) if task.batches else config
        (recorder,) = train(replace(one, stop=StopConfig(patience=0, max_rounds=stop)), 1, task)
    trained = dict(recorder.training.checkpoints.model.named_parameters())  # type: ignore[union-attr]
    assert len(task.batches) == 50
    for name, value in by_hand(task.begun, task.batches, config.learning_rate).items():
        assert torch.equal(trained[name], value), name


def test_groups_may_change_in_a_resumed_run(config: Config) -> None:
    train(replace(config, stop=StopConfig(patience=0, max_rounds=3)), 2, Recorded())
    other = replace(config.optim, groups=(GroupConfig(pattern="body.*", lr_factor=0.5),), decay="all")
    for recorder in train(replace(resumed(config, max_rounds=6), optim=other), 2, Recorded()):
        assert len(recorder.of(RoundReport)) == 3
        moments = recorder.training.checkpoints.parts["moments"].state_dict()  # type: ignore[union-attr]
        assert len(moments) == 2 * 10
