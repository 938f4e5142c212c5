"""The rules that the study compares: the settings of `sync` of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DRIFT_BOUNDS = {"alike": 2.0, "split": 8.0}
"""By split: about twice the median of the drift that the mlp showed with k = 10 on four ranks."""

CLIP = 0.25
"""About half of the norm of the averaged change that the rounds of the mlp with k = 10 had in the first third
of a training, at the learning rate 0.05."""

LONGEST = 48
"""Of the schedules that change the period."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to synchronize the ranks."""

    name: str
    sync: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `sync` that are not the defaults."""
    by_split: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further ones, by split."""
    by_rate: Mapping[str, float] = field(default_factory=dict)
    """Further ones, as multiples of the learning rate."""
    metric: str = ""
    """What precedes the name of the metric."""

    def settings(self, split: str, rate: float) -> dict[str, Any]:
        """Of `sync`."""
        scaled = {key: factor * rate for key, factor in self.by_rate.items()}
        return {**self.sync, **self.by_split.get(split, {}), **scaled}


GRADIENTS = Rule(name="gradients", sync={"mode": "gradients"})
REFERENCE = Rule(name="k = 10", sync={"period": 10})
"""What the others are compared with."""
SLOWMO = Rule(name="slowmo, k = 10", sync={"period": 10, "outer": "slowmo"})
DILOCO = Rule(name="nesterov, k = 100", sync={"period": 100, "outer": "nesterov"})

FEW = (REFERENCE, GRADIENTS, SLOWMO, DILOCO)
"""For the problems whose trainings take long."""

_WARMUP = {"schedule": "warmup", "warmup_rounds": 150}
_QSR = {"schedule": "qsr", "max_period": LONGEST}
_ADACOMM = {"schedule": "adacomm", "adacomm_steps": 150, "max_period": LONGEST}
_DRIFT = {"schedule": "drift", "max_period": LONGEST, "check_every": 1}

ALL = (
    REFERENCE,
    GRADIENTS,
    Rule(name="k = 1", sync={"period": 1}),
    Rule(name="k = 48", sync={"period": 48}),
    Rule(name="k = 100", sync={"period": 100}),
    Rule(name="k = 500", sync={"period": 500}),
    Rule(name="warmup, k = 48", sync={"period": 48, **_WARMUP}),
    # Exceeds 10 once the rate has fallen to a little less than half of the highest.
    Rule(name="qsr, k from 10", sync={"period": 10, **_QSR}, by_rate={"qsr_alpha": 0.5 * 10**0.5}),
    Rule(name="adacomm, k from 48", sync={"period": 48, **_ADACOMM}),
    Rule(
        name="drift, k from 10",
        sync={"period": 10, **_DRIFT},
        by_split={split: {"drift_bound": bound} for split, bound in DRIFT_BOUNDS.items()},
    ),
    SLOWMO,
    Rule(name="slowmo, k = 48", sync={"period": 48, "outer": "slowmo"}),
    DILOCO,
    Rule(name="nesterov, k = 500", sync={"period": 500, "outer": "nesterov"}),
    Rule(name="outliers dropped", sync={"period": 10, "outliers": "drop"}),
    Rule(name="outliers weighed", sync={"period": 10, "outliers": "weigh"}),
    Rule(name="clip", sync={"period": 10, "clip": CLIP}),
    Rule(name="moments kept", sync={"period": 10, "optimizer_state": "keep"}),
    Rule(name="moments reset", sync={"period": 10, "optimizer_state": "reset"}),
    Rule(name="momentum every 3 rounds", sync={"period": 10, "every_rounds": {"momentum_buffer": 3}}),
    Rule(name="ema 0.9", sync={"period": 10, "ema": 0.9}, metric="ema_"),
)
"""For the mlp. `auto` and `time` are left out: their periods depend on the speed of the machine, so that a
figure of theirs holds for one network and one load, and cannot be repeated."""
