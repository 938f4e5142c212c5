"""Whole trainings with a warm-up: what their checkpoints hold; resumed with another length of it, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_train.config import CheckpointConfig, Config, OptimConfig, StopConfig, SyncConfig
from hvd_train.errors import ConfigError
from hvd_train.preparation import _refuse_warm_up
from hvd_train.record.reports import RoundReport
from hvd_train.record.wording import header_lines
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.unit.trainings import Drawn, Remembered, small, train

WARM = 4


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(
        small(tmp_path),
        sync=SyncConfig(schedule="warmup", warmup_rounds=WARM, period=2),
        optim=OptimConfig(name="AdamW", lr=0.01),
        checkpoint=CheckpointConfig(every_rounds=1, keep=50),
    )


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What is on standard error since it was last asked, in one line."""
    return lambda: " ".join(capsys.readouterr().err.split())


def trained(config: Config, rounds: int, ranks: int = 2, name: str = "r", **sync: Any) -> Remembered:
    """Up to a round; a run that exists goes on."""
    stop = StopConfig(patience=0, max_rounds=rounds)
    changed = replace(config.sync, **sync)
    wanted = replace(config, name=name, resume="auto", stop=stop, sync=changed)
    return train(wanted, ranks, Drawn())[0]


def checkpoint(config: Config, rounds: int, name: str = "r") -> Path:
    return Path(config.runs) / name / "checkpoints" / f"round-{rounds}"


def model(config: Config, rounds: int, name: str = "r") -> bytes:
    return (checkpoint(config, rounds, name) / "model.safetensors").read_bytes()


def counters(config: Config, rounds: int, name: str = "r") -> set[float]:
    """Of the steps of the first rank's whole optimizer."""
    state = SavedCheckpoint.open(checkpoint(config, rounds, name)).part(0, "optimizer")
    return {float(value) for key, value in state.items() if key.endswith("/step")}


def test_a_checkpoint_has_slices_in_the_warm_up_and_moments_after_it(config: Config) -> None:
    recorder = trained(config, 6)
    assert [r.period for r in recorder.of(RoundReport)] == [1] * WARM + [2] * 2
    rule = "average gradients in every local step of the first 4 rounds, then parameters every 2 local steps"
    assert any(rule in line for line in header_lines(recorder.start))
    for rounds in range(1, 7):
        saved = SavedCheckpoint.open(checkpoint(config, rounds))
        moments, own = saved.parts(0)["moments"], saved.parts(0)["optimizer"]
        pieces = [saved.part(rank, "sliced")["offsets"] for rank in range(2)]
        assert bool(moments) is bool(own) is (rounds >= WARM)
        assert all(bool(of) is (rounds < WARM) for of in pieces)
    assert [counters(config, rounds) for rounds in (4, 5, 6)] == [{4.0}, {6.0}, {8.0}]


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_goes_on_with_other_ranks(config: Config, ranks: int) -> None:
    trained(config, 2)
    trained(config, 3, ranks)
    trained(config, 4, 2)
    trained(config, 6, ranks)
    assert counters(config, 6) == {8.0}


def test_a_shorter_warm_up_gathers_the_slices_at_the_start(config: Config, said: Callable[[], str]) -> None:
    """As if it had always been so."""
    trained(config, 2, warmup_rounds=2, name="short")
    trained(config, 6, warmup_rounds=2, name="short")
    trained(config, 2)
    said()
    recorder = trained(config, 6, warmup_rounds=2)
    assert [r.period for r in recorder.of(RoundReport)] == [2] * 4
    assert "begins anew" not in said()
    assert model(config, 6) == model(config, 6, "short")
    assert counters(config, 6) == {10.0}


def test_what_cannot_be_taken_is_said(config: Config, said: Callable[[], str]) -> None:
    trained(config, 2)
    trained(config, 3, schedule="fixed", warmup_rounds=0)
    assert "the run was within its warm-up, which is over now: the optimizer's state begins anew." in said()
    assert counters(config, 3) == {2.0}
    trained(config, 4, warmup_rounds=6)
    assert "the run goes back to its warm-up: the optimizer's state begins anew." in said()
    trained(config, 6, warmup_rounds=6)
    assert "begins anew" not in said()
    assert counters(config, 6) == {3.0}


def test_ranks_that_take_different_numbers_of_steps_cannot_warm_up() -> None:
    _refuse_warm_up(SyncConfig())
    with pytest.raises(
        ConfigError, match=r"^sync\.schedule = 'warmup': expected 'fixed' in a replay of a run "
    ):
        _refuse_warm_up(SyncConfig(schedule="warmup", warmup_rounds=2))
