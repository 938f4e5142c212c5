"""The learning rate at chosen points, and that it depends on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvd_train.algorithm.schedule import LearningRate
from hvd_train.config import LearningRateConfig


def factors(config: LearningRateConfig, *rounds: int) -> list[float]:
    rate = LearningRate(config, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    return [rate.factor(r, 10**6) for r in rounds]


def test_constant() -> None:
    assert factors(LearningRateConfig(), 0, 1, 10**6) == [1.0, 1.0, 1.0]


def test_warm_up_is_linear_and_never_zero() -> None:
    assert factors(LearningRateConfig(warmup=4), 0, 1, 2, 3, 4, 100) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_steps_are_counted_from_the_start_of_the_run() -> None:
    config = LearningRateConfig(schedule="step", every=10, factor=0.5, warmup=4)
    expected = [0.25, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
    assert factors(config, 0, 4, 9, 10, 19, 20, 39) == expected


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_floor() -> None:
    config = LearningRateConfig(schedule="cosine", total=110, warmup=10, floor=0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    expected = [0.1, 1.0, 1.0, quarter, 0.55, 0.1, 0.1]
    assert factors(config, 0, 9, 10, 35, 60, 110, 5000) == pytest.approx(expected, rel=1e-12)


def test_units_of_samples() -> None:
    config = LearningRateConfig(schedule="step", every=1000, factor=0.1, unit="samples")
    rate = LearningRate(config, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert [rate.factor(10**6, s) for s in (0, 999, 1000, 2500)] == pytest.approx([1, 1, 0.1, 0.01])


def test_each_group_keeps_its_own_rate_in_any_order_of_calls() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.4}, {"params": [b], "lr": 0.02}])
    rate = LearningRate(LearningRateConfig(schedule="step", every=10, factor=0.5), optimizer)
    for rounds, factor in ((0, 1.0), (25, 0.25), (10, 0.5), (10, 0.5)):
        rate.apply(rounds, samples=0)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.4 * factor, 0.02 * factor])
        assert rate.current == pytest.approx(0.4 * factor)


def test_the_rate_without_its_warm_up() -> None:
    config = LearningRateConfig(schedule="step", every=10, factor=0.5, warmup=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    rate = LearningRate(config, optimizer)
    assert [rate.without_warm_up(r, 10**6) for r in (0, 3, 9, 10, 25)] == [0.2, 0.2, 0.2, 0.1, 0.05]
    assert optimizer.param_groups[0]["lr"] == 0.2
