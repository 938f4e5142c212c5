"""What is averaged, how often, and how the average is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from hvd_train.config_values import require, require_usable

LONGEST_PLAIN_PERIOD = 48
"""Local steps above which plain averaging was seen to lose accuracy."""

BUFFERS = "buffers"
"""What `SyncConfig.every_rounds` calls the floating-point buffers of the model."""

Policy = Literal["average", "keep", "reset"]
"""What an average does with a state of the optimizer."""

_LONGEST_OUTER_PERIOD = 500
"""What DiLoCo takes."""

_NO_PERIODS = {"none": "never averages", "gradients": "averages in every local step"}
"""By mode: why there are no periods between averages."""

_OFF = {"outer": "none", "clip": 0.0, "outliers": "off", "moments": {}, "every_rounds": {}}

_WITHOUT_AVERAGES: dict[str, tuple[str, dict[str, object]]] = {
    "none": ("has no averages", {**_OFF, "ema": 0.0}),
    "gradients": (
        "averages gradients and not parameters",
        {**_OFF, "optimizer_state": "average", "wire": "float32"},
    ),
}
"""By mode: what cannot be used, why, and the value that says so."""


def require_states(moments: Mapping[str, str], every_rounds: Mapping[str, int]) -> None:
    """Raises `ConfigError` for a policy that there is not, and for a period that is not positive."""
    policies = get_args(Policy)
    for name, policy in moments.items():
        expected = f"one of {', '.join(map(repr, policies))}"
        require(policy in policies, f"sync.moments.{name}", policy, expected)
    for name, rounds in every_rounds.items():
        require(rounds >= 1, f"sync.every_rounds.{name}", rounds, "at least 1 round")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What is averaged, and how often."""

    mode: Annotated[Literal["average", "gradients", "none"], arg(aliases=["--sync"])] = "average"
    """`gradients` averages the gradients in every local step, in place of the parameters once a round.
    `none` never averages: a baseline for the gain and the cost of averaging."""

    period: Annotated[int, arg(aliases=["--period"])] = 10
    """Local steps between two averages (k); where the schedule changes that, the k that it starts from. With
    `gradients`: local steps of a round."""

    schedule: Annotated[
        Literal["fixed", "warmup", "qsr", "adacomm", "drift", "auto", "time"], arg(aliases=["--schedule"])
    ] = "fixed"
    """How k changes. `warmup`: gradients are averaged in the first rounds. `qsr`: grows as the learning rate
    falls. `adacomm`: falls with the training loss. `drift`: keeps the drift near a bound. `auto`: keeps the
    share of the time that communication takes. `time`: each rank takes the steps that fit into `seconds`, for
    ranks of unequal speed."""

    warmup_rounds: int = 0
    """With `warmup`: rounds of one step, in which gradients are averaged, before those of `period`."""

    qsr_alpha: float = 0.0
    """With `qsr`: k = max(`period`, floor((alpha / lr)^2)). It exceeds `period` where the learning
    rate is at most alpha / sqrt(`period` + 1)."""

    adacomm_steps: int = 500
    """With `adacomm`: local steps between two changes of k."""

    drift_bound: float = 0.0
    """With `drift`: the drift that k keeps to, in the unit of the squared parameters. The charts of a run
    with a fixed period show what is usual."""

    target_share: float = 0.05
    """With `auto`: the share of the time that communication may take."""

    seconds: float = 0.0
    """With `time`: seconds of local steps in a round. Long enough for ten steps of the slowest rank, if the
    network allows."""

    max_period: int | None = None
    """The largest k of `qsr`, `adacomm`, `drift` and `auto`. Not given: 48, or 500 with an outer
    optimizer."""

    replay_periods: Annotated[str, arg(aliases=["--replay-periods"])] = ""
    """Take the local steps of each round from the event log of the run in this folder, in place of the
    schedule."""

    optimizer_state: Policy = "average"
    """`average` it like the parameters, `keep` it on each rank, or `reset` it after each average."""

    moments: dict[str, Policy] = field(default_factory=dict)
    """The same for single moments of the optimizer, by their names in its state: `exp_avg_sq keep`. The
    others are treated as `optimizer_state` says."""

    every_rounds: dict[str, int] = field(default_factory=dict)
    """Average these moments, or the floating-point `buffers`, only in every n-th round, which saves their
    bytes in the others: `exp_avg 3 exp_avg_sq 6`, as in DES-LOC. What is not named: every round."""

    batch_norm: Literal["average", "keep"] = "average"
    """`average` floating-point buffers, such as running statistics, or `keep` them on each rank."""

    ema: float = 0.0
    """Also keep an exponential moving average of the averages, with this decay per round, such as 0.99: it is
    evaluated as `ema_error` and the like, and saved. Each rank holds its slice. 0: off."""

    outer: Annotated[Literal["none", "slowmo", "nesterov"], arg(aliases=["--outer"])] = "none"
    """Outer optimizer: what moves the parameters from x_t when the ranks' mean is known. `none`: they become
    the mean. `slowmo`: slow momentum. `nesterov`: that of DiLoCo, for periods of 50 to 500."""

    outer_lr: float | None = None
    """Learning rate of the outer optimizer. Not given: 1 for slowmo, 0.7 for nesterov."""

    outer_momentum: float | None = None
    """Its momentum. Not given: 0.7 for slowmo, 0.9 for nesterov."""

    outer_schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of its learning rate. `cosine` lowers it to `outer_floor` at `outer_total`."""

    outer_warmup: int = 0
    """Rounds over which its learning rate rises linearly at the start."""

    outer_total: int = 0
    """Rounds, including the warm-up, after which `cosine` reaches `outer_floor`."""

    outer_floor: float = 0.0
    """Final value of `cosine`, as a fraction of `outer_lr`."""

    clip: float = 0.0
    """Clip the averaged change of the parameters in a round to this 2-norm; 0: do not clip."""

    outliers: Literal["off", "drop", "weigh"] = "off"
    """What to do with a rank whose parameters changed far more than those of the ranks so far. `drop`: it has
    the weight 0. `weigh`: every rank's weight is multiplied by exp(-change). Both report it."""

    outlier_threshold: float = 3.0
    """How far that is, in standard deviations above the exponential average of the changes."""

    outlier_decay: float = 0.98
    """Decay per round of that average."""

    outlier_warmup: int = 10
    """Rounds at the start in which no rank is an outlier."""

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
        require(self.period >= 1, "sync.period", self.period, "at least 1 local step")
        self._check_schedule()
        require(0 <= self.ema < 1, "sync.ema", self.ema, "a decay in [0, 1)")
        self._check_averages()
        self._check_states()
        self._check_outer()
        self._check_outliers()
        expected = "a positive number of seconds"
        require(self.stall_timeout_s > 0, "sync.stall_timeout_s", self.stall_timeout_s, expected)
        expected = "0 or a number of seconds"
        require(self.step_timeout_s >= 0, "sync.step_timeout_s", self.step_timeout_s, expected)
        require(self.check_every >= 0, "sync.check_every", self.check_every, "0 or more rounds")

    def _check_schedule(self) -> None:
        named = self.schedule
        never = f"with sync.mode = {self.mode!r}, which {_NO_PERIODS.get(self.mode)}"
        averages = self.mode == "average"
        require(averages or named == "fixed", "sync.schedule", named, f"'fixed' {never}")
        replayed = self.replay_periods
        require(averages or not replayed, "sync.replay_periods", replayed, f"nothing {never}")
        # By key: the schedules that use it, whether its value is one, and what is one.
        rules: dict[str, tuple[tuple[str, ...], bool, str]] = {
            "period": (("fixed", "warmup", "qsr", "adacomm", "drift", "auto"), True, ""),
            "warmup_rounds": (("warmup",), self.warmup_rounds >= 1, "at least 1 round"),
            "qsr_alpha": (("qsr",), self.qsr_alpha > 0, "more than 0"),
            "adacomm_steps": (("adacomm",), self.adacomm_steps >= 1, "at least 1 local step"),
            "drift_bound": (("drift",), self.drift_bound > 0, "more than 0"),
            "target_share": (("auto",), 0 < self.target_share < 1, "a share between 0 and 1"),
            "seconds": (("time",), self.seconds > 0, "more than 0 s"),
            "max_period": (
                ("qsr", "adacomm", "drift", "auto"),
                self.longest_period >= self.period,
                f"at least sync.period = {self.period}",
            ),
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for key, (schedules, is_one, expected) in rules.items():
            value = self.longest_period if key == "max_period" else getattr(self, key)
            if named in schedules:
                require(is_one, f"sync.{key}", value, f"{expected} with sync.schedule = {named!r}")
            else:
                value, default = getattr(self, key), defaults[key]
                expected = "it not to be given" if default is None else f"{default!r}, the default,"
                unused = f"{expected} with sync.schedule = {named!r}, which ignores it"
                require(value == default, f"sync.{key}", value, unused)
        measured = named != "drift" or self.check_every > 0
        expected = "at least 1 with sync.schedule = 'drift', which follows what these checks measure"
        require(measured, "sync.check_every", self.check_every, expected)

    @property
    def longest_period(self) -> int:
        """The largest k that the schedule may choose; `time` has none."""
        if self.schedule in ("fixed", "warmup", "time"):
            return self.period
        if self.max_period is not None:
            return self.max_period
        return LONGEST_PLAIN_PERIOD if self.outer == "none" else _LONGEST_OUTER_PERIOD

    def remark(self) -> str:
        """What the user should know of the choice; empty if there is nothing."""
        if self.mode != "average" or self.outer != "none" or self.longest_period <= LONGEST_PLAIN_PERIOD:
            return ""
        key = "period" if self.longest_period == self.period else "max_period"
        return (
            f"sync.{key} = {self.longest_period} without an outer optimizer: above {LONGEST_PLAIN_PERIOD} "
            "local steps plain averaging tends to lose accuracy. Set sync.outer = 'nesterov', or a shorter "
            "period."
        )

    def _check_averages(self) -> None:
        """What has no meaning without averages of the parameters must be off there."""
        for mode, (why, offs) in _WITHOUT_AVERAGES.items():
            for name, off in offs.items() if self.mode == mode else ():
                value = getattr(self, name)
                named = "it not to be given" if off == {} else f"{off or 0!r}"
                expected = f"{named} with sync.mode = {mode!r}, which {why}"
                require(value == off, f"sync.{name}", value, expected)

    def _check_states(self) -> None:
        require_states(self.moments, self.every_rounds)
        averaged = self.batch_norm == "average" or BUFFERS not in self.every_rounds
        expected = "'average' with a period of buffers in sync.every_rounds"
        require(averaged, "sync.batch_norm", self.batch_norm, expected)

    def _check_outer(self) -> None:
        off = {"outer_lr": None, "outer_momentum": None, "outer_schedule": "constant", "outer_warmup": 0}
        for name, default in {**off, "outer_total": 0, "outer_floor": 0.0}.items():
            value = getattr(self, name)
            expected = "it not to be given with sync.outer = 'none'"
            require(self.outer != "none" or value == default, f"sync.{name}", value, expected)
        lr, momentum = self.outer_lr, self.outer_momentum
        require(lr is None or lr > 0, "sync.outer_lr", lr, "a positive learning rate")
        require(
            momentum is None or 0 <= momentum < 1, "sync.outer_momentum", momentum, "a momentum in [0, 1)"
        )
        require(self.outer_warmup >= 0, "sync.outer_warmup", self.outer_warmup, "0 or more rounds")
        require(self.outer_total >= 0, "sync.outer_total", self.outer_total, "0 or more rounds")
        require(0 <= self.outer_floor <= 1, "sync.outer_floor", self.outer_floor, "a fraction in [0, 1]")
        if self.outer_schedule == "cosine":
            expected = "more than sync.outer_warmup with sync.outer_schedule = 'cosine'"
            require(self.outer_total > self.outer_warmup, "sync.outer_total", self.outer_total, expected)

    def _check_outliers(self) -> None:
        require(self.clip >= 0, "sync.clip", self.clip, "0 or a positive norm")
        threshold, decay, warmup = self.outlier_threshold, self.outlier_decay, self.outlier_warmup
        expected = "a positive number of standard deviations"
        require(threshold > 0, "sync.outlier_threshold", threshold, expected)
        require(0 <= decay < 1, "sync.outlier_decay", decay, "a decay in [0, 1)")
        require(warmup >= 1, "sync.outlier_warmup", warmup, "at least 1 round")
