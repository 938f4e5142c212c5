"""What is said of a schedule of the period that cannot be, or of a value that the schedule ignores."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_train.config import Config, DataConfig, SyncConfig
from hvd_train.errors import ConfigError

GOOD: dict[str, dict[str, Any]] = {
    "fixed": {},
    "warmup": {"warmup_rounds": 1},
    "qsr": {"qsr_alpha": 0.1},
    "adacomm": {},
    "drift": {"drift_bound": 1.0},
    "auto": {},
    "time": {"seconds": 0.5},
}

GRADIENTS = "with sync.mode = 'gradients', which averages gradients and not parameters."


@pytest.mark.parametrize("schedule", GOOD)
def test_a_schedule_needs_its_own_values_only(schedule: str) -> None:
    SyncConfig(schedule=schedule, **GOOD[schedule])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"schedule": "warmup"},
            "warmup_rounds = 0: expected at least 1 round with sync.schedule = 'warmup'.",
        ),
        ({"schedule": "qsr"}, "qsr_alpha = 0.0: expected more than 0 with sync.schedule = 'qsr'."),
        (
            {"schedule": "adacomm", "adacomm_steps": 0},
            "adacomm_steps = 0: expected at least 1 local step with sync.schedule = 'adacomm'.",
        ),
        ({"schedule": "drift"}, "drift_bound = 0.0: expected more than 0 with sync.schedule = 'drift'."),
        (
            {"schedule": "auto", "target_share": 1.0},
            "target_share = 1.0: expected a share between 0 and 1 with sync.schedule = 'auto'.",
        ),
        (
            {"schedule": "auto", "period": 50},
            "max_period = 48: expected at least sync.period = 50 with sync.schedule = 'auto'.",
        ),
        (
            {"schedule": "drift", "drift_bound": 1.0, "check_every": 0},
            "check_every = 0: expected at least 1 with sync.schedule = 'drift', which follows what these "
            "checks measure.",
        ),
        ({"schedule": "time"}, "seconds = 0.0: expected more than 0 s with sync.schedule = 'time'."),
        (
            {"schedule": "time", "seconds": 1.0, "period": 20},
            "period = 20: expected 10, the default, with sync.schedule = 'time', which ignores it.",
        ),
        (
            {"seconds": 1.0},
            "seconds = 1.0: expected 0.0, the default, with sync.schedule = 'fixed', which ignores it.",
        ),
        (
            {"schedule": "qsr", "qsr_alpha": 0.1, "warmup_rounds": 5},
            "warmup_rounds = 5: expected 0, the default, with sync.schedule = 'qsr', which ignores it.",
        ),
        (
            {"max_period": 100},
            "max_period = 100: expected it not to be given with sync.schedule = 'fixed', which ignores it.",
        ),
        (
            {"mode": "none", "schedule": "auto"},
            "schedule = 'auto': expected 'fixed' with sync.mode = 'none', which never averages.",
        ),
        (
            {"mode": "none", "replay_periods": "runs/a"},
            "replay_periods = 'runs/a': expected nothing with sync.mode = 'none', which never averages.",
        ),
        (
            {"mode": "gradients", "schedule": "auto"},
            "schedule = 'auto': expected 'fixed' with sync.mode = 'gradients', which averages in every local "
            "step.",
        ),
        (
            {"mode": "gradients", "replay_periods": "runs/a"},
            "replay_periods = 'runs/a': expected nothing with sync.mode = 'gradients', which averages in "
            "every local step.",
        ),
        *(
            ({"mode": "gradients", key: value}, f"{key} = {value!r}: expected {off!r} {GRADIENTS}")
            for key, value, off in (
                ("outer", "slowmo", "none"),
                ("clip", 1.0, 0),
                ("outliers", "drop", "off"),
                ("optimizer_state", "keep", "average"),
                ("wire", "bfloat16", "float32"),
            )
        ),
    ],
)
def test_other_values_are_refused_with_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyncConfig(**values)
    assert str(caught.value) == f"sync.{message}"


@pytest.mark.parametrize(
    ("key", "value", "usual"), [("order", "global", "rank"), ("redeal", "epoch", "never")]
)
def test_with_time_every_rank_has_rows_of_its_own(key: str, value: str, usual: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(sync=SyncConfig(schedule="time", seconds=1.0), data=DataConfig(**{key: value}))
    assert str(caught.value) == (
        f"data.{key} = {value!r}: expected {usual!r} with sync.schedule = 'time', as every rank passes "
        "epochs of its own."
    )


def test_an_outer_optimizer_allows_longer_periods() -> None:
    assert SyncConfig(schedule="auto").longest_period == 48
    assert SyncConfig(schedule="auto", outer="nesterov").longest_period == 500
    assert SyncConfig(schedule="auto", outer="nesterov", max_period=60).longest_period == 60
    assert SyncConfig(period=7, outer="nesterov").longest_period == 7
