"""How the shared parameters move on from x_t when the ranks' mean is known: rules of outer optimizers.

A rule takes x_t - mean, the change of a whole round, as a gradient. It works element by element and sees one
slice, on the rank that owns it: `OuterStep` gives it the slice, keeps its state and puts it into checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from hvd_train.algorithm.schedule import factor
from hvd_train.config import LearningRateConfig, SyncConfig
from hvd_train.config_values import require


@dataclass(frozen=True, kw_only=True)
class OuterRule(ABC):
    """A rule of an outer optimizer. A third one needs `name`, `keeps` and `step`.

    Raises `ConfigError` for a learning rate that is not positive or a momentum that is not in [0, 1).
    """

    name: ClassVar[str]
    """In the configuration, and in checkpoints: only a rule of the same name takes over what one has kept."""
    keeps: ClassVar[tuple[str, ...]]
    """Names of what it keeps: one value of each for every parameter, zeros at the start."""

    lr: float
    momentum: float
    schedule: LearningRateConfig = field(default_factory=LearningRateConfig)
    """What multiplies `lr`; its units are outer steps."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "outer_lr", self.lr, "a positive learning rate")
        require(0 <= self.momentum < 1, "outer_momentum", self.momentum, "a momentum in [0, 1)")

    def lr_at(self, steps: int) -> float:
        """The learning rate of the outer step that follows `steps` others."""
        return self.lr * factor(self.schedule, steps)

    @abstractmethod
    def step(self, x: Tensor, mean: Tensor, kept: Mapping[str, Tensor], lr: float, local_lr: float) -> None:
        """mean := x_(t+1), in place. Not collective.

        Args:
            x: x_t, flat, float32 or float64; not to be written to.
            mean: of the ranks, of the same shape and type.
            kept: by the names in `keeps` what this step is to replace in place, of the same shape and type.
            lr: of this outer step.
            local_lr: of the local optimizer's first parameter group in the round that ends; it may be 0.
        """


@final
@dataclass(frozen=True, kw_only=True)
class SlowMo(OuterRule):
    """Slow momentum (J. Wang, V. Tantia, N. Ballas and M. Rabbat, "SlowMo: Improving Communication-Efficient
    Distributed SGD with Slow Momentum", ICLR 2020, arXiv:1910.00643, algorithm 1):

        u_(t+1) = beta u_t + (x_t - mean) / gamma_t,    x_(t+1) = x_t - alpha gamma_t u_(t+1)

    with alpha = `lr`, beta = `momentum` and gamma_t the local learning rate. As the rates of all parameter
    groups keep their ratios, it does not matter which of them gamma_t is of.
    """

    name: ClassVar[str] = "slowmo"
    keeps: ClassVar[tuple[str, ...]] = ("slow_momentum",)
    lr: float = 1.0
    momentum: float = 0.7

    def step(self, x: Tensor, mean: Tensor, kept: Mapping[str, Tensor], lr: float, local_lr: float) -> None:
        """See `OuterRule`. With a local learning rate of 0 the mean is x_t, and only u decays."""
        u = kept["slow_momentum"].mul_(self.momentum)
        if local_lr == 0:
            return
        change = mean.sub_(x).neg_()
        u.add_(change, alpha=1 / local_lr)
        torch.sub(x, u, alpha=lr * local_lr, out=mean)


@final
@dataclass(frozen=True, kw_only=True)
class Nesterov(OuterRule):
    """The outer optimizer of DiLoCo (A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of
    Language Models", 2023, arXiv:2311.08105, algorithm 1): Nesterov momentum, as torch.optim.SGD has it, on
    the outer gradient g = x_t - mean:

        u_(t+1) = mu u_t + g,    x_(t+1) = x_t - lr (g + mu u_(t+1))
    """

    name: ClassVar[str] = "nesterov"
    keeps: ClassVar[tuple[str, ...]] = ("momentum",)
    lr: float = 0.7
    momentum: float = 0.9

    def step(self, x: Tensor, mean: Tensor, kept: Mapping[str, Tensor], lr: float, local_lr: float) -> None:
        """See `OuterRule`."""
        gradient = mean.sub_(x).neg_()
        u = kept["momentum"].mul_(self.momentum).add_(gradient)
        gradient.add_(u, alpha=self.momentum)
        torch.sub(x, gradient, alpha=lr, out=mean)


_RULES: Mapping[str, type[OuterRule]] = {rule.name: rule for rule in (SlowMo, Nesterov)}


def make_rule(sync: SyncConfig) -> OuterRule | None:
    """The rule that `sync.outer` names; None for `none`."""
    if sync.outer == "none":
        return None
    given = {"lr": sync.outer_lr, "momentum": sync.outer_momentum}
    schedule = LearningRateConfig(
        schedule=sync.outer_schedule,
        warmup=sync.outer_warmup,
        total=sync.outer_total,
        floor=sync.outer_floor,
    )
    return _RULES[sync.outer](schedule=schedule, **{k: v for k, v in given.items() if v is not None})
