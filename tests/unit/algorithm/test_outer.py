"""The rules of outer optimizers, element by element: torch's SGD as the oracle, the formulas, schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hvd_train.algorithm.outer import Nesterov, OuterRule, SlowMo, make_rule
from hvd_train.config import LearningRateConfig, SyncConfig
from hvd_train.errors import ConfigError

NUMEL, STEPS = 37, 30


def change(step: int) -> Tensor:
    """x_t - mean of a round."""
    return torch.sin(torch.arange(NUMEL, dtype=torch.float64) * 0.7 + step) / (step + 2)


def moved(rule: OuterRule, local_lr: float = 0.05) -> list[Tensor]:
    """x_1, x_2, ... by a rule."""
    x = torch.linspace(-1, 1, NUMEL, dtype=torch.float64)
    kept = {name: torch.zeros_like(x) for name in rule.keeps}
    found = []
    for step in range(STEPS):
        mean = x - change(step)
        before = x.clone()
        rule.step(x, mean, kept, rule.lr_at(step), local_lr)
        assert torch.equal(x, before), "x_t is not written to"
        x = mean
        found.append(x)
    return found


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.99)])
def test_nesterov_is_that_of_torch(lr: float, momentum: float) -> None:
    x = torch.nn.Parameter(torch.linspace(-1, 1, NUMEL, dtype=torch.float64))
    oracle = torch.optim.SGD([x], lr=lr, momentum=momentum, nesterov=True)
    for step, found in enumerate(moved(Nesterov(lr=lr, momentum=momentum))):
        x.grad = change(step)
        oracle.step()
        torch.testing.assert_close(found, x.detach(), rtol=0, atol=1e-13)


def test_its_learning_rate_has_a_schedule() -> None:
    """torch's own warm-up and cosine, one after the other."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, NUMEL, dtype=torch.float64))
    oracle = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(oracle, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=20, eta_min=0.07)
    schedule = torch.optim.lr_scheduler.SequentialLR(oracle, [warm_up, cosine], milestones=[5])
    rule = Nesterov(schedule=LearningRateConfig(schedule="cosine", warmup=5, total=25, floor=0.1))
    for step, found in enumerate(moved(rule)[:26]):
        x.grad = change(step)
        oracle.step()
        schedule.step()
        torch.testing.assert_close(found, x.detach(), rtol=0, atol=1e-13)
    assert rule.lr_at(0) == pytest.approx(0.14)
    assert rule.lr_at(1000) == pytest.approx(0.07)


def test_slowmo_is_the_formula_of_its_paper() -> None:
    alpha, beta, gamma = 0.8, 0.6, 0.05
    x, u = torch.linspace(-1, 1, NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for step, found in enumerate(moved(SlowMo(lr=alpha, momentum=beta), gamma)):
        u = beta * u + change(step) / gamma
        x = x - alpha * gamma * u
        torch.testing.assert_close(found, x, rtol=0, atol=1e-13)


def test_slowmo_without_momentum_is_the_plain_average() -> None:
    for step, found in enumerate(moved(SlowMo(momentum=0.0))):
        total = sum(change(s) for s in range(step + 1))
        expected = torch.linspace(-1, 1, NUMEL, dtype=torch.float64) - total
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_slowmo_at_a_local_learning_rate_of_zero() -> None:
    """As at the end of a cosine: no rank moved, nothing is divided by 0, and u decays."""
    x = torch.ones(3)
    mean, kept = x.clone(), {"slow_momentum": torch.full((3,), 2.0)}
    SlowMo(momentum=0.5).step(x, mean, kept, 1.0, 0.0)
    assert mean.tolist() == [1, 1, 1]
    assert kept["slow_momentum"].tolist() == [1, 1, 1]


def test_the_configuration_names_a_rule() -> None:
    assert make_rule(SyncConfig()) is None
    assert make_rule(SyncConfig(outer="slowmo")) == SlowMo(lr=1.0, momentum=0.7)
    assert make_rule(SyncConfig(outer="nesterov")) == Nesterov(lr=0.7, momentum=0.9)
    sync = SyncConfig(
        outer="nesterov",
        outer_lr=0.5,
        outer_momentum=0.0,
        outer_schedule="cosine",
        outer_warmup=2,
        outer_total=12,
        outer_floor=0.25,
    )
    rule = make_rule(sync)
    assert isinstance(rule, Nesterov)
    assert (rule.lr, rule.momentum) == (0.5, 0.0)
    expected = [0.25, 0.5, 0.5 * (0.25 + 0.75 * (1 + math.cos(math.pi / 2)) / 2), 0.125]
    assert [rule.lr_at(step) for step in (0, 1, 7, 12)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outer": "nesterov", "outer_lr": 0.0}, r"sync\.outer_lr = 0\.0: expected a positive learning rate"),
        (
            {"outer": "slowmo", "outer_momentum": 1.0},
            r"sync\.outer_momentum = 1\.0: expected a momentum in",
        ),
        (
            {"outer_lr": 0.7},
            r"sync\.outer_lr = 0\.7: expected it not to be given with sync\.outer = 'none'\.",
        ),
        (
            {"outer_floor": 0.5},
            r"sync\.outer_floor = 0\.5: expected it not to be given with sync\.outer",
        ),
        (
            {"outer": "slowmo", "outer_schedule": "cosine", "outer_warmup": 5, "outer_total": 5},
            r"sync\.outer_total = 5: expected more than sync\.outer_warmup with sync\.outer_schedule",
        ),
        ({"outer": "slowmo", "outer_warmup": -1}, r"sync\.outer_warmup = -1: expected 0 or more rounds"),
        (
            {"outer": "slowmo", "outer_floor": 2.0},
            r"sync\.outer_floor = 2\.0: expected a fraction in \[0, 1\]",
        ),
        (
            {"mode": "none", "outer": "slowmo"},
            r"sync\.outer = 'slowmo': expected 'none' with sync\.mode = 'none'",
        ),
        (
            {"mode": "none", "clip": 1.0},
            r"sync\.clip = 1\.0: expected 0 with sync\.mode = 'none', which has no",
        ),
        (
            {"mode": "none", "outliers": "drop"},
            r"sync\.outliers = 'drop': expected 'off' with sync\.mode = 'none",
        ),
        ({"clip": -1.0}, r"sync\.clip = -1\.0: expected 0 or a positive norm"),
        (
            {"outlier_threshold": 0.0},
            r"sync\.outlier_threshold = 0\.0: expected a positive number of standard",
        ),
        ({"outlier_decay": 1.0}, r"sync\.outlier_decay = 1\.0: expected a decay in \[0, 1\)"),
        ({"outlier_warmup": 0}, r"sync\.outlier_warmup = 0: expected at least 1 round"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyncConfig(**values)  # type: ignore[arg-type]


def test_a_rule_checks_its_values() -> None:
    with pytest.raises(ConfigError, match=r"outer_lr = 0: expected a positive learning rate"):
        Nesterov(lr=0)
    with pytest.raises(ConfigError, match=r"outer_momentum = 1\.0: expected a momentum in \[0, 1\)"):
        SlowMo(momentum=1.0)
