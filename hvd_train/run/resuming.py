"""What happens if a run is resumed with another configuration: one rule for each key.

A checkpoint holds the configuration that it was written with as the part `settings`: config.toml in the run's
folder may have been edited since, or be that of a start that brought no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

import msgspec

from hvd_train.config import Config, flatten
from hvd_train.errors import ConfigError
from hvd_train.io.stateful import State, checked


class Rule(Enum):
    """What happens where a key has another value than before, in words."""

    REFUSED = "refused"
    NEXT = "counts from the next round on"
    START = "nothing: it counts at the start of a new run"
    DROPOUT = "counts from the next round on; refused where it was 0 or becomes 0"
    PLACE = "the run goes on in that place"
    WHOLE = "counts from the start of the run, as if it had always been so"
    LIMIT = "counts from the start of the run; refused where the run has done as much"
    SAMPLE = "refused where a sample becomes another one"
    DATA = "the epoch begins anew if files or rows differ, and so does the best if validation rows do"
    ORDER = "the epoch goes on with the rows that it has left, in another order"
    READING = (
        "the epoch goes on with the rows that it has left; in another order where one of the two reads as a "
        "stream"
    )
    STATES = (
        "counts from the next round on; state that is averaged in every round now, and was not before, "
        "begins with that of rank 0"
    )
    EMA = "counts from the next round on; the moving average begins with the next round where it was off"
    OUTER = "counts from the next round on; momentum and schedule of the outer optimizer begin anew"
    STEPS = "counts from the first step of this outer optimizer, as if it had always been so"
    NORMS = "counts from the next round on; the averages of the norms begin with it where it was off"
    BATCH = "the epoch goes on with the rows that it has left"
    BEST = "best, curve and patience begin anew"
    LOSS = "counts from the next round on; best, curve and patience begin anew where the loss is watched"
    SCHEDULE = (
        "counts from the next round on; what the schedule has gathered so far is dropped, and the epoch "
        "begins anew if one of the two is `time`"
    )
    OPTIMIZER = "the optimizer's state begins anew"
    MODE = "the optimizer's state begins anew; refused where it was `none` or becomes `none`"
    ARGUMENTS = (
        "counts from the next round on; state that the optimizer keeps no longer is dropped, all of it where "
        "it is not averaged"
    )


RULES: Mapping[str, Rule] = {
    "name": Rule.PLACE,
    "runs": Rule.PLACE,
    "task": Rule.BEST,
    "class_weights": Rule.LOSS,
    "backend": Rule.NEXT,
    "threads": Rule.NEXT,
    "seed": Rule.ORDER,
    "resume": Rule.PLACE,
    "data.path": Rule.DATA,
    "data.validation": Rule.DATA,
    "data.fields": Rule.SAMPLE,
    "data.inputs": Rule.SAMPLE,
    "data.targets": Rule.SAMPLE,
    "data.weights": Rule.SAMPLE,
    "data.mask": Rule.SAMPLE,
    "data.classes": Rule.SAMPLE,
    "data.one_hot": Rule.SAMPLE,
    "data.ignore_index": Rule.SAMPLE,
    "data.max_length": Rule.SAMPLE,
    "data.truncate": Rule.SAMPLE,
    "data.samples_axis": Rule.SAMPLE,
    "data.follow_links": Rule.DATA,
    "data.batch_size": Rule.BATCH,
    "data.last_batch": Rule.BATCH,
    "data.workers": Rule.NEXT,
    "data.reading": Rule.READING,
    "data.order": Rule.ORDER,
    "data.redeal": Rule.ORDER,
    "data.cache": Rule.NEXT,
    "data.scale": Rule.SAMPLE,
    "data.standardize": Rule.REFUSED,
    "data.not_finite": Rule.NEXT,
    "data.on_damage": Rule.NEXT,
    "model.name": Rule.REFUSED,
    "model.hidden": Rule.REFUSED,
    "model.channels": Rule.REFUSED,
    "model.embedding": Rule.REFUSED,
    "model.context": Rule.REFUSED,
    "model.dropout": Rule.DROPOUT,
    "model.init": Rule.START,
    "model.init_strict": Rule.START,
    "model.init_map": Rule.START,
    "model.freeze": Rule.ARGUMENTS,
    "model.compile": Rule.NEXT,
    "optim.name": Rule.OPTIMIZER,
    "optim.lr": Rule.NEXT,
    "optim.args": Rule.ARGUMENTS,
    "optim.groups": Rule.NEXT,
    "optim.decay": Rule.NEXT,
    "optim.clip_norm": Rule.NEXT,
    "optim.accumulate": Rule.BATCH,
    "optim.precision": Rule.NEXT,
    "learning_rate.schedule": Rule.WHOLE,
    "learning_rate.unit": Rule.WHOLE,
    "learning_rate.warmup": Rule.WHOLE,
    "learning_rate.every": Rule.WHOLE,
    "learning_rate.factor": Rule.WHOLE,
    "learning_rate.total": Rule.WHOLE,
    "learning_rate.floor": Rule.WHOLE,
    "sync.mode": Rule.MODE,
    "sync.period": Rule.NEXT,
    "sync.schedule": Rule.SCHEDULE,
    "sync.warmup_rounds": Rule.WHOLE,
    "sync.qsr_alpha": Rule.NEXT,
    "sync.adacomm_steps": Rule.NEXT,
    "sync.drift_bound": Rule.NEXT,
    "sync.target_share": Rule.NEXT,
    "sync.seconds": Rule.NEXT,
    "sync.max_period": Rule.NEXT,
    "sync.replay_periods": Rule.SCHEDULE,
    "sync.optimizer_state": Rule.STATES,
    "sync.moments": Rule.STATES,
    "sync.every_rounds": Rule.STATES,
    "sync.batch_norm": Rule.STATES,
    "sync.ema": Rule.EMA,
    "sync.outer": Rule.OUTER,
    "sync.outer_lr": Rule.NEXT,
    "sync.outer_momentum": Rule.NEXT,
    "sync.outer_schedule": Rule.STEPS,
    "sync.outer_warmup": Rule.STEPS,
    "sync.outer_total": Rule.STEPS,
    "sync.outer_floor": Rule.STEPS,
    "sync.clip": Rule.NEXT,
    "sync.outliers": Rule.NORMS,
    "sync.outlier_threshold": Rule.NEXT,
    "sync.outlier_decay": Rule.NEXT,
    "sync.outlier_warmup": Rule.NEXT,
    "sync.wire": Rule.NEXT,
    "sync.stall_timeout_s": Rule.NEXT,
    "sync.step_timeout_s": Rule.NEXT,
    "sync.check_every": Rule.NEXT,
    "stop.patience": Rule.NEXT,
    "stop.min_delta": Rule.NEXT,
    "stop.target_error": Rule.NEXT,
    "stop.max_epochs": Rule.LIMIT,
    "stop.max_rounds": Rule.LIMIT,
    "stop.max_seconds": Rule.NEXT,
    "stop.divergence": Rule.NEXT,
    "evaluate.metric": Rule.BEST,
    "evaluate.metrics": Rule.NEXT,
    "evaluate.mode": Rule.BEST,
    "evaluate.every_epochs": Rule.NEXT,
    "evaluate.every_rounds": Rule.NEXT,
    "evaluate.batch_size": Rule.NEXT,
    "evaluate.batch_norm_batches": Rule.NEXT,
    "checkpoint.every_rounds": Rule.NEXT,
    "checkpoint.keep": Rule.NEXT,
    "record.observe": Rule.NEXT,
    "record.tensorboard": Rule.NEXT,
    "record.metrics_port": Rule.NEXT,
    "record.metrics_host": Rule.NEXT,
    "record.sinks": Rule.NEXT,
    "record.report": Rule.NEXT,
}
"""For every key of the configuration."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """`Settings` as a checkpoint holds them."""

    config: dict[str, Any]
    validation: str | None = None
    """None: not known."""


class Settings:
    """The configuration as a part of a checkpoint. Stateful; restored first, since it decides which of the
    other parts still hold.

    Args:
        config: of this start.
        validation: the rows that are evaluated: (file, first row, row after the last).
    """

    def __init__(self, config: Config, validation: Sequence[tuple[str, int, int]]) -> None:
        self._now = flatten(config)
        # Names without folders: data that moved to another place is still the same data.
        rows = [[PurePath(file).name, start, stop] for file, start, stop in validation]
        self._validation = (
            hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest() if rows else ""
        )
        self.before: Mapping[str, Any] = {}
        """Every key as it was; empty if that is not known."""
        self.best_holds = True
        """Whether values of the watched metric so far can be compared with those to come."""
        self.optimizer_holds = True
        """Whether the optimizer is of the same class, and its state in the same place."""
        self.arguments_hold = True
        """Whether it has the same arguments and the same parameters."""
        self.schedule_holds = True
        """Whether the schedule of the period is the same one."""
        self.remarks: list[str] = []
        """What begins anew and why, for the user."""

    def state_dict(self) -> dict[str, Any]:
        """Every key, and which rows are evaluated."""
        return {"config": _plain(self._now), "validation": self._validation}

    def load_state_dict(self, state: State) -> None:
        """Compares. Raises `ConfigError` for a key that must stay as it is, and `RunDirectoryError` for a
        state that `state_dict` does not give."""
        saved = checked(state, _Saved)
        now, before = _plain(self._now), _plain(saved.config)
        if before:  # keys that it lacks are of a later version than the one that wrote it
            before = {**_plain(flatten(Config())), **before}
        self.before = before
        changed = [key for key in RULES if key in before and before[key] != now[key]]
        for key in changed:
            # A model without dropout has fewer layers, and other names of those after it.
            other_layers = RULES[key] is Rule.DROPOUT and 0 in (before[key], now[key])
            alone = RULES[key] is Rule.MODE and "none" in (before[key], now[key])
            if RULES[key] is Rule.REFUSED or other_layers or alone:
                raise ConfigError(
                    f"{key} = {now[key]!r}: the run was trained with {before[key]!r}, and its checkpoint "
                    "fits nothing else. Give that value, or begin a new run."
                )
        for key in changed:
            if RULES[key] in (Rule.OPTIMIZER, Rule.MODE):
                self.optimizer_holds = False
                self.remarks.append(
                    f"{key} was {before[key]!r} and is {now[key]!r}: the optimizer's state begins anew."
                )
        self.schedule_holds = not any(RULES[key] is Rule.SCHEDULE for key in changed)
        self.arguments_hold = not any(RULES[key] is Rule.ARGUMENTS for key in changed)
        reasons = self._why_best_ends(before, now, changed, saved.validation)
        if reasons:
            self.best_holds = False
            self.remarks.append(f"{' and '.join(reasons)}: best, curve and patience begin anew.")

    def _why_best_ends(
        self, before: Mapping[str, Any], now: Mapping[str, Any], changed: list[str], validation: str | None
    ) -> list[str]:
        if _task_class(str(before.get("task", now["task"]))) == _task_class(now["task"]):
            changed = [key for key in changed if key != "task"]  # its file was moved
        reasons = [
            f"{key} was {before[key]!r} and is {now[key]!r}"
            for key in changed
            if (
                RULES[key] is Rule.BEST
                or (RULES[key] is Rule.LOSS and (now["evaluate.metric"] == "loss" or not self._validation))
            )
        ]
        other_rows = "data.validation" in changed if validation is None else validation != self._validation
        return [*reasons, "the validation rows differ"] if other_rows else reasons


def settings_before(config: Config | None) -> State:
    """The part `settings` for a checkpoint without one, from its run's configuration; empty if that is not
    known either."""
    return {"config": {} if config is None else flatten(config)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As a checkpoint holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _task_class(task: str) -> tuple[str, str]:
    """The task's file or module, without a folder, and its class."""
    source, _, name = task.rpartition(":")
    return PurePath(source).name, name
