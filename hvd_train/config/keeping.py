"""What a run evaluates, saves and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on the validation data, divided among the ranks."""

    metric: str = "error"
    """The metric for the stop rules and the best checkpoint: `loss`, or one that the task returns; of one
    that is a vector an entry, such as `recall_by_class[3]`."""

    metrics: tuple[str, ...] = ()
    """Further metrics of the built-in tasks, such as `roc_auc`; `all` for all of them."""

    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value of the metric is better."""

    every_epochs: int = 1
    """Evaluate every this many epochs, in the round that completes them; 0: not by epochs."""

    every_rounds: int = 500
    """Also evaluate every this many rounds; 0: not by rounds."""

    batch_size: int = 256
    """Samples of one forward pass."""

    batch_norm_batches: int = 0
    """Before an evaluation compute the running statistics of batch norm anew, from this many training batches
    of each rank, and keep them in the model; 0: evaluate with those of the training."""

    def __post_init__(self) -> None:
        require_usable(self, "evaluate.")
        require(self.every_epochs >= 0, "evaluate.every_epochs", self.every_epochs, "0 or more epochs")
        require(self.every_rounds >= 0, "evaluate.every_rounds", self.every_rounds, "0 or more rounds")
        require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1 sample")
        batches = self.batch_norm_batches
        require(batches >= 0, "evaluate.batch_norm_batches", batches, "0 or more batches")
        off = self.every_epochs == 0 and self.every_rounds == 0
        require(not off, "evaluate.every_rounds", 0, "every_epochs or every_rounds to be on")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints. One is always saved at a new best error, at the end and at an interruption."""

    every_rounds: int = 0
    """Also save a checkpoint every this many rounds; 0: no further ones."""

    keep: int = 2
    """Number of recent checkpoints to keep, in addition to the best."""

    def __post_init__(self) -> None:
        require_usable(self, "checkpoint.")
        require(self.every_rounds >= 0, "checkpoint.every_rounds", self.every_rounds, "0 or more rounds")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a run reports besides its rounds, evaluations, checkpoints and faults."""

    observe: bool = True
    """Also report the seconds, memory and CPU of each rank, and norms of the parameters, updates and
    gradients of each layer."""

    tensorboard: bool = False
    """Also write event files of TensorBoard into the run's folder. Needs `hvd_train[tensorboard]`."""

    metrics_port: Annotated[int, arg(aliases=["--metrics-port"])] = 0
    """Serve the run's figures to Prometheus on this port of rank 0's host; 0: do not. Needs
    `hvd_train[metrics]`."""

    metrics_host: str = "127.0.0.1"
    """The address to serve them on; `0.0.0.0` is all of the host's."""

    sinks: tuple[str, ...] = ()
    """Objects of yours that take the run's events: `file.py:factory` or `package.module:factory`."""

    report: bool = False
    """At the end, write `report.html` into the run's folder: all charts in one file. Needs
    `hvd_train[monitor]`."""

    def __post_init__(self) -> None:
        require_usable(self, "record.")
        port = self.metrics_port
        require(0 <= port <= 65535, "record.metrics_port", port, "0 to 65535")
