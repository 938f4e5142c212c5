"""What is averaged and how often, and when the run ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from hvd_train.config_values import require, require_usable


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """What is averaged, and how often."""

    mode: Annotated[Literal["average", "none"], arg(aliases=["--sync"])] = "average"
    """`none` never averages: a baseline for the gain and the cost of averaging."""

    period: Annotated[int, arg(aliases=["--period"])] = 10
    """Local steps between two averages (k); where the schedule changes that, the k that it starts from."""

    schedule: Annotated[
        Literal["fixed", "warmup", "qsr", "adacomm", "drift", "auto"], arg(aliases=["--schedule"])
    ] = "fixed"
    """How k changes. `warmup`: 1 in the first rounds. `qsr`: grows as the learning rate falls. `adacomm`:
    falls with the training loss. `drift`: keeps the drift near a bound. `auto`: keeps the share of the time
    that communication takes."""

    warmup_rounds: int = 0
    """With `warmup`: rounds of one local step before those of `period`."""

    qsr_alpha: float = 0.0
    """With `qsr`: k = max(`period`, floor((alpha / lr)^2)). It begins to grow where the learning rate is
    alpha / sqrt(`period`)."""

    adacomm_steps: int = 500
    """With `adacomm`: local steps between two changes of k."""

    drift_bound: float = 0.0
    """With `drift`: the drift that k keeps to, in the unit of the squared parameters. The charts of a run
    with a fixed period show what is usual."""

    target_share: float = 0.05
    """With `auto`: the share of the time that communication may take."""

    max_period: int = 48
    """The largest k of `qsr`, `adacomm`, `drift` and `auto`."""

    replay_periods: Annotated[str, arg(aliases=["--replay-periods"])] = ""
    """Take the k of each round from the event log of the run in this folder, in place of the schedule."""

    optimizer_state: Literal["average", "keep", "reset"] = "average"
    """`average` it like the parameters, `keep` it on each rank, or `reset` it after each average."""

    batch_norm: Literal["average", "keep"] = "average"
    """`average` floating-point buffers, such as running statistics, or `keep` them on each rank."""

    ema: float = 0.0
    """Also keep an exponential moving average of the averages, with this decay per round, such as 0.99: it is
    evaluated as `ema_error` and the like, and saved. Each rank holds its slice. 0: off."""

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
        self._check_schedule()
        require(0 <= self.ema < 1, "sync.ema", self.ema, "a decay in [0, 1)")
        off = self.mode == "average" or not self.ema
        require(off, "sync.ema", self.ema, "0 with sync.mode = 'none', which has no averages")
        expected = "a positive number of seconds"
        require(self.stall_timeout_s > 0, "sync.stall_timeout_s", self.stall_timeout_s, expected)
        expected = "0 or a number of seconds"
        require(self.step_timeout_s >= 0, "sync.step_timeout_s", self.step_timeout_s, expected)
        require(self.check_every >= 0, "sync.check_every", self.check_every, "0 or more rounds")

    def _check_schedule(self) -> None:
        named = self.schedule
        never = "with sync.mode = 'none', which never averages"
        averages = self.mode == "average"
        require(averages or named == "fixed", "sync.schedule", named, f"'fixed' {never}")
        replayed = self.replay_periods
        require(averages or not replayed, "sync.replay_periods", replayed, f"nothing {never}")
        # By key: the schedules that use it, whether its value is one, and what is one.
        rules: dict[str, tuple[tuple[str, ...], bool, str]] = {
            "warmup_rounds": (("warmup",), self.warmup_rounds >= 1, "at least 1 round"),
            "qsr_alpha": (("qsr",), self.qsr_alpha > 0, "more than 0"),
            "adacomm_steps": (("adacomm",), self.adacomm_steps >= 1, "at least 1 local step"),
            "drift_bound": (("drift",), self.drift_bound > 0, "more than 0"),
            "target_share": (("auto",), 0 < self.target_share < 1, "a share between 0 and 1"),
            "max_period": (
                ("qsr", "adacomm", "drift", "auto"),
                self.max_period >= self.period,
                f"at least sync.period = {self.period}",
            ),
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for key, (schedules, is_one, expected) in rules.items():
            value = getattr(self, key)
            if named in schedules:
                require(is_one, f"sync.{key}", value, f"{expected} with sync.schedule = {named!r}")
            else:
                unused = f"{defaults[key]!r}, the default, with sync.schedule = {named!r}, which ignores it"
                require(value == defaults[key], f"sync.{key}", value, unused)
        measured = named != "drift" or self.check_every > 0
        expected = "at least 1 with sync.schedule = 'drift', which follows what these checks measure"
        require(measured, "sync.check_every", self.check_every, expected)


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
        require(self.patience >= 0, "stop.patience", self.patience, "0 or more evaluations")
        require(self.min_delta >= 0, "stop.min_delta", self.min_delta, "0 or a positive error")
        for name in ("max_epochs", "max_rounds", "max_seconds"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"stop.{name}", limit, "a positive limit")
        require(
            self.divergence is None or self.divergence > 1, "stop.divergence", self.divergence, "more than 1"
        )
        rules = (self.patience or None, self.target_error, self.max_epochs, self.max_rounds, self.max_seconds)
        require(any(r is not None for r in rules), "stop.patience", 0, "at least one stop rule to be on")
