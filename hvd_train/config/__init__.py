"""The configuration: frozen dataclasses, whose values are checked where they are made.

Every field has a default and a docstring; the command line shows both. Paths are relative to the
directory in which the program is started.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from hvd_train.config.data import DataConfig
from hvd_train.config.keeping import CheckpointConfig, EvaluateConfig, RecordConfig
from hvd_train.config.model import ModelConfig
from hvd_train.config.optim import GroupConfig, LearningRateConfig, OptimConfig, Value
from hvd_train.config.stop import StopConfig
from hvd_train.config.sync import SyncConfig
from hvd_train.config_values import require, require_usable

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "GroupConfig",
    "LearningRateConfig",
    "ModelConfig",
    "OptimConfig",
    "RecordConfig",
    "StopConfig",
    "SyncConfig",
    "Value",
    "flatten",
    "is_safe",
]

_MOST_THREADS = 4096
"""More than any host has cores. What starts them ends the process where it cannot."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    name: str = ""
    """Name of the run's folder. Empty: the Slurm job's id, else task, date and four hex digits."""

    runs: str = "runs"
    """The folder that holds the runs; every rank must have access to it."""

    task: str = "classification"
    """`classification`, `regression`, `next-token`, or your own: `file.py:Class`, `package.module:Class`."""

    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss (classification). Empty: all 1."""

    backend: Literal["auto", "solo", "mpi", "horovod", "ring"] = "auto"
    """Communication backend. `auto`: ring under an MPI launcher, or mpi if ring is not built; horovod under
    horovodrun without MPI; solo without a launcher."""

    threads: int = 0
    """Number of torch threads on each rank; 0: the rank's share of the cores that it may use."""

    seed: int = 0
    """Seed of the parameters, the order of the samples and dropout."""

    resume: str = ""
    """`auto`: resume from the newest complete checkpoint of the run with this name, or start it if there is
    none. A path: resume from that run or checkpoint."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    def __post_init__(self) -> None:
        require_usable(self)
        safe = all(map(is_safe, self.name)) and self.name.strip(".") == self.name
        require(safe, "name", self.name, "letters, digits and -_.+ only, no dot at either end")
        expected = "weights of at least 0, not all of them 0"
        weights = self.class_weights
        require(all(w >= 0 for w in weights), "class_weights", weights, expected)
        require(not weights or any(weights), "class_weights", weights, expected)
        expected = f"0, or 1 to {_MOST_THREADS:,} threads"
        require(0 <= self.threads <= _MOST_THREADS, "threads", self.threads, expected)
        require(self.seed >= 0, "seed", self.seed, "a seed of at least 0")
        plain = self.sync.wire == "float32" or self.backend in ("auto", "ring")
        require(plain, "sync.wire", self.sync.wire, f"float32 with backend = {self.backend!r}")
        batches = self.evaluate.batch_norm_batches
        expected = "0 with sync.mode = 'none', where every rank has a model of its own"
        one_model = self.sync.mode != "none" or not batches
        require(one_model, "evaluate.batch_norm_batches", batches, expected)
        if self.sync.schedule == "time":
            self.require_own_rows("with sync.schedule = 'time'")
        factor, minimised = self.stop.divergence, self.evaluate.mode == "min"
        contradicts = self.evaluate.metric == "loss" and not minimised
        expected = "'min' with evaluate.metric = 'loss', which the training minimises"
        require(not contradicts, "evaluate.mode", self.evaluate.mode, expected)
        expected = "the rule to be off with evaluate.mode = 'max'"
        require(factor is None or minimised, "stop.divergence", factor, expected)

    def require_own_rows(self, why: str) -> None:
        """Raises `ConfigError` if the ranks do not read rows of their own, the same in every epoch."""
        epochs = f"{why}, as every rank passes epochs of its own"
        require(self.data.order == "rank", "data.order", self.data.order, f"'rank' {epochs}")
        require(self.data.redeal == "never", "data.redeal", self.data.redeal, f"'never' {epochs}")


def is_safe(character: str) -> bool:
    """Whether a run's name may hold the character."""
    return character.isalnum() or character in "-_.+"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"sync.period": 10, ...}`: one entry a field, None included; for comparing two configurations."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        elif isinstance(value, tuple):
            flat[prefix + f.name] = tuple(flatten(v) if dataclasses.is_dataclass(v) else v for v in value)
        else:
            flat[prefix + f.name] = value
    return flat
