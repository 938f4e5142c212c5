"""The rules of averaging whose combinations are tried. A new rule is one line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvd_train.config import Config, SyncConfig
from hvd_train.config_file import embedded_config

RULES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "gradients": {"mode": "gradients"},
    "fixed": {"schedule": "fixed"},
    "warmup": {"schedule": "warmup", "warmup_rounds": 2},
    "qsr": {"schedule": "qsr", "qsr_alpha": 0.1, "max_period": 4},
    "adacomm": {"schedule": "adacomm", "adacomm_steps": 4, "max_period": 4},
    "drift": {"schedule": "drift", "drift_bound": 0.1, "max_period": 4},
    "auto": {"schedule": "auto", "max_period": 4},
    "time": {"schedule": "time", "seconds": 0.02, "period": 10},
    "slowmo": {"outer": "slowmo"},
    "nesterov": {"outer": "nesterov"},
    "clip": {"clip": 0.05},
    "drop": {"outliers": "drop", "outlier_warmup": 1},
    "weigh": {"outliers": "weigh", "outlier_warmup": 1},
    "ema": {"ema": 0.5},
    "state kept": {"optimizer_state": "keep"},
    "state reset": {"optimizer_state": "reset"},
    "moment kept": {"moments": {"momentum_buffer": "keep"}},
    "own periods": {"every_rounds": {"momentum_buffer": 3, "buffers": 2}},
    "norm kept": {"batch_norm": "keep"},
}
"""Name in the tables: keys of `sync` and their values, which must be valid by themselves."""

BACKENDS = ("solo", "mpi", "ring", "horovod")
SHORT_WIRES = ("bfloat16", "float16", "int8")

COMMON: dict[str, Any] = {"period": 2, "check_every": 1}
"""Of every run: all ranks compare their bits in every round."""


def of_one_key(first: str, second: str) -> bool:
    """Whether two rules are values of one key, so that there is no combination of them."""
    return not RULES[first].keys().isdisjoint(RULES[second])


def sync(*rules: str, **others: Any) -> SyncConfig:
    """The configuration of some rules together. Raises `ConfigError` if they do not go together."""
    values = {**COMMON, **others}
    for rule in rules:
        values |= RULES[rule]
    return SyncConfig(**values)


def config(runs: str, name: str, sync: SyncConfig, rounds: int = 3, backend: str = "auto") -> Config:
    """A short training of the embedded digits; where it exists already it goes on. Raises `ConfigError` for
    what does not go together."""
    digits = embedded_config()
    return replace(
        digits,
        runs=runs,
        name=name,
        resume="auto",
        backend=backend,
        threads=1,
        sync=sync,
        model=replace(digits.model, hidden=(8,)),
        evaluate=replace(digits.evaluate, every_rounds=50),
        stop=replace(digits.stop, patience=0, max_rounds=rounds),
    )
