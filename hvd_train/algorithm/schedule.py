"""The learning rate in the course of a run, by a rule that is the same on every rank."""

from __future__ import annotations

import math
from typing import final

from torch.optim import Optimizer

from hvd_train.config import LearningRateConfig


def factor(config: LearningRateConfig, units: int) -> float:
    """What a learning rate is multiplied by after `units` units.

    The warm-up factor is (units + 1) / warmup until that reaches 1, so that the first round does something.
    `step` counts its steps from the start; `cosine` falls from the end of the warm-up to `floor` at `total`,
    and stays there.
    """
    warm_up = min(1.0, (units + 1) / config.warmup) if config.warmup else 1.0
    return warm_up * _decay(config, units)


def _decay(c: LearningRateConfig, units: int) -> float:
    if c.schedule == "step":
        return c.factor ** (units // c.every)
    if c.schedule == "cosine":
        done = min(1.0, max(0, units - c.warmup) / (c.total - c.warmup))
        return c.floor + (1 - c.floor) * (1 + math.cos(math.pi * done)) / 2
    return 1.0


@final
class LearningRate:
    """The learning rate of `optimizer` as a pure function of what all ranks know: it has no state, and a
    resumed run continues it by itself.

    The rates that the parameter groups have now are the ones that are multiplied.
    """

    def __init__(self, config: LearningRateConfig, optimizer: Optimizer) -> None:
        self._config = config
        self._groups = optimizer.param_groups
        self._rates = [float(group["lr"]) for group in self._groups]

    def factor(self, rounds: int, samples: int) -> float:
        """What the configured learning rate is multiplied by in the round that starts after `rounds` rounds
        and `samples` samples of all ranks together."""
        return factor(self._config, rounds if self._config.unit == "rounds" else samples)

    def without_warm_up(self, rounds: int, samples: int) -> float:
        """The rate of the first parameter group in that round as if there were no warm-up: during one, the
        rate that it leads to."""
        return self._rates[0] * _decay(self._config, rounds if self._config.unit == "rounds" else samples)

    def apply(self, rounds: int, samples: int) -> None:
        """Sets the rate of each parameter group to its first one times `factor`."""
        factor = self.factor(rounds, samples)
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * factor

    @property
    def current(self) -> float:
        """The rate of the first parameter group."""
        return float(self._groups[0]["lr"])
