"""The local optimizer and the schedule of its learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from hvd_train.config_values import require, require_usable

Value = bool | int | float | str | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """One of `[[optim.groups]]`: parameters with a learning rate and a weight decay of their own."""

    pattern: str
    """Which parameters, by their names: `backbone.*`."""

    lr_factor: float = 1.0
    """Their learning rate is `optim.lr` times this; the schedule multiplies it like every rate."""

    weight_decay: float | None = None
    """Their weight decay; not given: that of the optimizer."""

    def __post_init__(self) -> None:
        require_usable(self, "optim.groups.")
        require(self.pattern != "", "optim.groups.pattern", self.pattern, "a pattern of names")
        expected = "a positive factor. To train nothing set model.freeze"
        require(self.lr_factor > 0, "optim.groups.lr_factor", self.lr_factor, expected)
        decay = self.weight_decay
        require(decay is None or decay >= 0, "optim.groups.weight_decay", decay, "0 or a positive number")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The local optimizer of every rank. A file can also give parts of the model a learning rate and a weight
    decay of their own: `[[optim.groups]]` with `pattern`, `lr_factor` and `weight_decay`."""

    name: str = "SGD"
    """Any class of torch.optim that steps without a closure."""

    lr: Annotated[float, arg(aliases=["--lr"])] = 0.05
    """Learning rate, used as given: it is not multiplied by the world size."""

    args: dict[str, Value] = field(default_factory=dict)
    """Keyword arguments of the optimizer. Empty: its defaults, except Nesterov momentum 0.9 for SGD."""

    groups: tuple[GroupConfig, ...] = ()
    """Parts of the model with their own settings. The first pattern that fits a parameter counts."""

    decay: Literal["all", "matrices"] = "all"
    """Which parameters have weight decay, also in `groups`. `matrices`: those with two dimensions or more
    that are not in a norm layer; biases and norms have none."""

    clip_norm: float = 0.0
    """Clip the gradient to this 2-norm; 0: do not clip."""

    accumulate: int = 1
    """Batches per local step; their gradients are summed, weighted by their samples."""

    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs forward and loss under torch.autocast in bfloat16; parameters stay float32."""

    def __post_init__(self) -> None:
        require_usable(self, "optim.")
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(self.clip_norm >= 0, "optim.clip_norm", self.clip_norm, "0 or a positive norm")
        require(self.accumulate >= 1, "optim.accumulate", self.accumulate, "at least 1 batch")


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
        require(self.warmup >= 0, "learning_rate.warmup", self.warmup, "0 or more units")
        require(self.every >= 0, "learning_rate.every", self.every, "0 or more units")
        require(0 < self.factor <= 1, "learning_rate.factor", self.factor, "a factor in (0, 1]")
        require(self.total >= 0, "learning_rate.total", self.total, "0 or more units")
        require(0 <= self.floor <= 1, "learning_rate.floor", self.floor, "a fraction in [0, 1]")
        if self.schedule == "step":
            require(self.every >= 1, "learning_rate.every", self.every, "at least 1 with schedule = 'step'")
        if self.schedule == "cosine":
            expected = "more than warmup with schedule = 'cosine'"
            require(self.total > self.warmup, "learning_rate.total", self.total, expected)
