"""The configuration: frozen dataclasses, whose values are checked where they are made.

Every field has a default and a docstring; the command line shows both. Paths are relative to the
directory in which the program is started.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from hvd_train.config_values import require as _require
from hvd_train.config_values import require_usable

_MOST_THREADS = 4096
"""More than any host has cores. What starts them ends the process where it cannot."""

Value = bool | int | float | str | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from."""

    path: Annotated[str, arg(aliases=["--data"])] = "digits"
    """A folder with a manifest.json, a folder of HDF5 files, one file, a glob pattern, or the word
    `digits` for the embedded default."""

    validation: float | str = ""
    """Validation data of a source without a manifest: a path or glob pattern, or a fraction of the training
    rows (0.1), split off in blocks. Empty: the validation part of the manifest, else none."""

    inputs: str = "inputs"
    """Name of the HDF5 dataset that holds the inputs; samples are along the first axis."""

    targets: str = "targets"
    """Name of the HDF5 dataset that holds the targets."""

    batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 64
    """Samples of one local step on one rank."""

    reading: Literal["auto", "memory", "stream"] = "auto"
    """`memory` keeps the rank's rows in memory; `stream` reads blocks of rows in random order as they are
    needed. `auto` chooses memory if the rows of all ranks of a host fit into half of its free memory, within
    the limits of the kernel, the job's cgroups, the Slurm allocation, and `ulimit -v` and `-d`."""

    scale: float | None = None
    """Factor applied to integer inputs before the model. Default: the one recorded in the shard, else 1."""

    def __post_init__(self) -> None:
        require_usable(self, "data.")
        _require(self.path != "", "data.path", self.path, "a path, a glob pattern or `digits`")
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1 sample")
        if isinstance(self.validation, (int, float)):
            expected = "a fraction between 0 and 1"
            _require(0 < self.validation < 1, "data.validation", self.validation, expected)
        _require(
            self.scale != 0, "data.scale", self.scale, "a factor other than 0, which would remove the inputs"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The built-in models. Your own task builds its own model and may ignore these keys."""

    name: Literal["mlp", "cnn"] = "mlp"
    """`mlp`: fully connected layers. `cnn`: convolutions, for images and for token sequences."""

    hidden: tuple[int, ...] = (128, 64)
    """Widths of the hidden layers of `mlp`, and of the layers after the convolutions of `cnn`."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels of each convolution of `cnn`."""

    embedding: int = 32
    """Width of a token's embedding (next-token)."""

    context: int = 8
    """Tokens that `mlp` sees before the one it predicts (next-token)."""

    dropout: float = 0.0
    """Probability of dropping a hidden unit while training."""

    def __post_init__(self) -> None:
        require_usable(self, "model.")
        for name in ("hidden", "channels"):
            widths = getattr(self, name)
            _require(all(w >= 1 for w in widths), f"model.{name}", widths, "every width to be at least 1")
        _require(self.embedding >= 1, "model.embedding", self.embedding, "a width of at least 1")
        _require(self.context >= 1, "model.context", self.context, "at least 1 token")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "a probability in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The local optimizer of every rank."""

    name: str = "SGD"
    """Any class of torch.optim that steps without a closure."""

    lr: Annotated[float, arg(aliases=["--lr"])] = 0.05
    """Learning rate, used as given: it is not multiplied by the world size."""

    args: dict[str, Value] = field(default_factory=dict)
    """Keyword arguments of the optimizer. Empty: its defaults, except Nesterov momentum 0.9 for SGD."""

    clip_norm: float = 0.0
    """Clip the gradient to this 2-norm; 0: do not clip."""

    accumulate: int = 1
    """Batches per local step; their gradients are summed, weighted by their samples."""

    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs forward and loss under torch.autocast in bfloat16; parameters stay float32."""

    def __post_init__(self) -> None:
        require_usable(self, "optim.")
        _require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        _require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "0 or a positive norm")
        _require(self.accumulate >= 1, "optim.accumulate", self.accumulate, "at least 1 batch")


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Schedule of the learning rate: a function of the round, or of the samples that all ranks together have
    used, and therefore the same on every rank."""

    schedule: Literal["constant", "step", "cosine"] = "constant"
    """`step` multiplies it by `factor` every `every` units; `cosine` lowers it to `floor` at `total`."""

    unit: Literal["rounds", "samples"] = "rounds"
    """Unit of `warmup`, `every` and `total`."""

    warmup: int = 0
    """Units over which the rate rises linearly at the start."""

    every: int = 0
    """Units between two reductions by the schedule `step`."""

    factor: float = 0.1
    """Factor of the schedule `step`."""

    total: int = 0
    """Units, including the warm-up, after which `cosine` reaches `floor`."""

    floor: float = 0.0
    """Final value of `cosine`, as a fraction of the learning rate."""

    def __post_init__(self) -> None:
        require_usable(self, "learning_rate.")
        _require(self.warmup >= 0, "learning_rate.warmup", self.warmup, "0 or more units")
        _require(self.every >= 0, "learning_rate.every", self.every, "0 or more units")
        _require(0 < self.factor <= 1, "learning_rate.factor", self.factor, "a factor in (0, 1]")
        _require(self.total >= 0, "learning_rate.total", self.total, "0 or more units")
        _require(0 <= self.floor <= 1, "learning_rate.floor", self.floor, "a fraction in [0, 1]")
        if self.schedule == "step":
            _require(self.every >= 1, "learning_rate.every", self.every, "at least 1 with schedule = 'step'")
        if self.schedule == "cosine":
            expected = "more than warmup with schedule = 'cosine'"
            _require(self.total > self.warmup, "learning_rate.total", self.total, expected)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What is averaged, and how often."""

    mode: Annotated[Literal["average", "none"], arg(aliases=["--sync"])] = "average"
    """`none` never averages: a baseline for the gain and the cost of averaging."""

    period: Annotated[int, arg(aliases=["--period"])] = 10
    """Local steps between two averages (k)."""

    optimizer_state: Literal["average", "keep", "reset"] = "average"
    """`average` it like the parameters, `keep` it on each rank, or `reset` it after each average."""

    batch_norm: Literal["average", "keep"] = "average"
    """`average` floating-point buffers, such as running statistics, or `keep` them on each rank."""

    wire: Annotated[Literal["float32", "bfloat16", "float16", "int8"], arg(aliases=["--wire"])] = "float32"
    """Data type of the elements sent between hosts (backend ring). The 16- and 8-bit types carry rounded
    differences from the last average; within a host nothing is rounded."""

    stall_timeout_s: float = 300.0
    """Seconds without progress after which a rank that others wait for counts as lost, and the job ends. A
    rank makes progress while it computes, reads, evaluates or writes, however long that takes."""

    step_timeout_s: float = 0.0
    """Time limit in seconds for one local step, even if the rank is busy: ends a computation that never
    returns. 0: no limit."""

    check_every: int = 10
    """Rounds between two checks that all ranks hold the same bits, and between two measurements of the drift;
    0: never."""

    def __post_init__(self) -> None:
        require_usable(self, "sync.")
        _require(self.period >= 1, "sync.period", self.period, "at least 1 local step")
        expected = "a positive number of seconds"
        _require(self.stall_timeout_s > 0, "sync.stall_timeout_s", self.stall_timeout_s, expected)
        expected = "0 or a number of seconds"
        _require(self.step_timeout_s >= 0, "sync.step_timeout_s", self.step_timeout_s, expected)
        _require(self.check_every >= 0, "sync.check_every", self.check_every, "0 or more rounds")


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When the run ends. The first rule that holds ends it; all rules can be combined."""

    patience: Annotated[int, arg(aliases=["--patience"])] = 5
    """Stop after this many evaluations without an improvement; 0: never."""

    min_delta: float = 0.0
    """Smallest decrease of the error that counts as an improvement."""

    target_error: Annotated[float | None, arg(aliases=["--target-error"])] = None
    """Stop when the error is at or below this value."""

    max_epochs: Annotated[int | None, arg(aliases=["--max-epochs"])] = None
    """Stop after this many passes over all shards."""

    max_rounds: Annotated[int | None, arg(aliases=["--max-rounds"])] = None
    """Stop after this many rounds, including those before a resume."""

    max_seconds: Annotated[float | None, arg(aliases=["--max-seconds"])] = None
    """Stop after this many seconds of training, counted from this start."""

    divergence: float | None = None
    """Stop as diverged when the error exceeds the best one by this factor. A run in which no rank is finite
    always stops."""

    def __post_init__(self) -> None:
        require_usable(self, "stop.")
        _require(self.patience >= 0, "stop.patience", self.patience, "0 or more evaluations")
        _require(self.min_delta >= 0, "stop.min_delta", self.min_delta, "0 or a positive error")
        for name in ("max_epochs", "max_rounds", "max_seconds"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, f"stop.{name}", limit, "a positive limit")
        _require(
            self.divergence is None or self.divergence > 1, "stop.divergence", self.divergence, "more than 1"
        )
        rules = (self.patience or None, self.target_error, self.max_epochs, self.max_rounds, self.max_seconds)
        _require(any(r is not None for r in rules), "stop.patience", 0, "at least one stop rule to be on")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation on the validation data, divided among the ranks."""

    metric: str = "error"
    """The metric for the stop rules and the best checkpoint: `loss`, or one that the task returns."""

    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value of the metric is better."""

    every_epochs: int = 1
    """Evaluate every this many epochs, in the round that completes them; 0: not by epochs."""

    every_rounds: int = 500
    """Also evaluate every this many rounds; 0: not by rounds."""

    batch_size: int = 256
    """Samples of one forward pass."""

    def __post_init__(self) -> None:
        require_usable(self, "evaluate.")
        _require(self.every_epochs >= 0, "evaluate.every_epochs", self.every_epochs, "0 or more epochs")
        _require(self.every_rounds >= 0, "evaluate.every_rounds", self.every_rounds, "0 or more rounds")
        _require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1 sample")
        off = self.every_epochs == 0 and self.every_rounds == 0
        _require(not off, "evaluate.every_rounds", 0, "every_epochs or every_rounds to be on")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints. One is always saved at a new best error, at the end and at an interruption."""

    every_rounds: int = 0
    """Also save a checkpoint every this many rounds; 0: no further ones."""

    keep: int = 2
    """Number of recent checkpoints to keep, in addition to the best."""

    def __post_init__(self) -> None:
        require_usable(self, "checkpoint.")
        _require(self.every_rounds >= 0, "checkpoint.every_rounds", self.every_rounds, "0 or more rounds")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


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
        _require(0 <= port <= 65535, "record.metrics_port", port, "0 to 65535")


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
        _require(safe, "name", self.name, "letters, digits and -_.+ only, no dot at either end")
        expected = "weights of at least 0, not all of them 0"
        weights = self.class_weights
        _require(all(w >= 0 for w in weights), "class_weights", weights, expected)
        _require(not weights or any(weights), "class_weights", weights, expected)
        expected = f"0, or 1 to {_MOST_THREADS:,} threads"
        _require(0 <= self.threads <= _MOST_THREADS, "threads", self.threads, expected)
        _require(self.seed >= 0, "seed", self.seed, "a seed of at least 0")
        plain = self.sync.wire == "float32" or self.backend in ("auto", "ring")
        _require(plain, "sync.wire", self.sync.wire, f"float32 with backend = {self.backend!r}")
        factor, minimised = self.stop.divergence, self.evaluate.mode == "min"
        contradicts = self.evaluate.metric == "loss" and not minimised
        expected = "'min' with evaluate.metric = 'loss', which the training minimises"
        _require(not contradicts, "evaluate.mode", self.evaluate.mode, expected)
        expected = "the rule to be off with evaluate.mode = 'max'"
        _require(factor is None or minimised, "stop.divergence", factor, expected)


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
        else:
            flat[prefix + f.name] = value
    return flat
