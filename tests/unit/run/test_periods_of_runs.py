"""Whole trainings with a schedule of the period: resumed, changed, and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import hvd_train
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, LearningRateConfig, SyncConfig
from hvd_train.errors import HvdTrainError
from hvd_train.record.reports import PeriodReport, RoundReport
from hvd_train.run.layout import anchored
from hvd_train.run.replay import periods_of
from tests.unit.trainings import Remembered, resumed, small, train

SCHEDULES = [
    SyncConfig(period=4, schedule="warmup", warmup_rounds=6),
    SyncConfig(period=4, schedule="qsr", qsr_alpha=0.08, max_period=20),
    SyncConfig(period=9, schedule="adacomm", adacomm_steps=25),
    SyncConfig(period=4, schedule="drift", drift_bound=0.002, check_every=2),
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Its learning rate falls by half every five rounds, so that every schedule changes the period."""
    rate = LearningRateConfig(schedule="step", every=5, factor=0.5)
    return replace(small(tmp_path), learning_rate=rate)


def periods(recorder: Remembered) -> list[int]:
    return [r.period for r in recorder.of(RoundReport)]


def model(config: Config, rounds: int) -> bytes:
    file = Path(config.runs) / config.name / "checkpoints" / f"round-{rounds}" / "model.safetensors"
    return file.read_bytes()


@pytest.mark.parametrize("sync", SCHEDULES[:3], ids=lambda sync: sync.schedule)
def test_a_resumed_run_has_the_periods_of_an_uninterrupted_one(sync: SyncConfig, config: Config) -> None:
    """On one rank, whose initial weights no other thread touches; tests/mpi has several, and `drift`."""
    config = replace(config, sync=sync)
    whole = replace(config, name="whole", stop=replace(config.stop, max_rounds=16))
    expected = periods(train(whole, 1)[0])
    assert len(set(expected)) > 1
    found = periods(train(replace(config, stop=replace(config.stop, max_rounds=7)), 1)[0])
    for rounds in (8, 16):
        found += periods(train(resumed(config, max_rounds=rounds), 1)[0])
    assert found == expected
    assert model(config, 16) == model(whole, 16)


def test_the_period_of_qsr_follows_the_rate_behind_its_warm_up(config: Config) -> None:
    rate = replace(config.learning_rate, warmup=4)
    sync = SyncConfig(period=4, schedule="qsr", qsr_alpha=0.1)
    config = replace(config, sync=sync, learning_rate=rate, stop=replace(config.stop, max_rounds=12))
    (recorder,) = train(config, 1)
    assert periods(recorder) == [4] * 5 + [16] * 5 + [48] * 2
    assert recorder.start.schedule == "average every max(4, floor((0.1 / lr)^2)) local steps, at most 48"


@pytest.mark.parametrize("before", range(4))
def test_another_schedule_begins_anew(before: int, config: Config) -> None:
    after = SCHEDULES[before - 1]
    train(replace(config, sync=SCHEDULES[before]), 1)
    (recorder,) = train(replace(resumed(config, max_rounds=5), sync=after), 1)
    assert periods(recorder)[0] == (1 if after.schedule == "warmup" else after.period)


def kept(config: Config) -> tuple[Config, list[int]]:
    """A run with its event log, and its periods."""
    result = hvd_train.train(config, comm=SoloCommunicator())
    return config, [k for _, k in each_round(periods_of(str(result.run), 1))]


def each_round(stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(round, k) of each round."""
    found: list[tuple[int, int]] = []
    for last, k in stretches:
        found += [(r, k) for r in range(len(found) + 1, last + 1)]
    return found


def test_replayed_periods_repeat_a_run_to_the_bit(config: Config) -> None:
    first, expected = kept(replace(config, sync=SCHEDULES[2], stop=replace(config.stop, max_rounds=16)))
    assert len(set(expected)) > 2
    sync = SyncConfig(period=3, replay_periods=f"{config.runs}/r")
    again = replace(first, name="again", sync=sync, stop=replace(config.stop, max_rounds=9))
    kept(again)
    _, found = kept(replace(again, resume="auto", stop=replace(config.stop, max_rounds=16)))
    assert found == expected
    assert model(again, 16) == model(first, 16)
    (recorder,) = train(replace(again, name="longer", stop=replace(config.stop, max_rounds=18)), 1)
    assert recorder.start.schedule == f"average when {config.runs}/r did"
    assert periods(recorder) == [*expected, expected[-1], expected[-1]]
    (report,) = recorder.of(PeriodReport)
    assert (report.round, report.period) == (17, expected[-1])
    assert report.message.startswith(f"{config.runs}/r ends with round 16: ")


def test_the_run_that_is_replayed_is_named_by_an_absolute_path(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(config.runs).parent)
    assert anchored(config).sync.replay_periods == ""
    named = replace(config, sync=SyncConfig(replay_periods="runs/r"))
    assert anchored(named).sync.replay_periods == f"{config.runs}/r"


def test_a_run_that_cannot_be_replayed_is_refused_before_anything_is_written(config: Config) -> None:
    sync = SyncConfig(replay_periods=f"{config.runs}/none")
    with pytest.raises(
        HvdTrainError, match=r"there is no .*/none/events\.jsonl; expected the folder of a run"
    ):
        hvd_train.train(replace(config, sync=sync), comm=SoloCommunicator())
    assert not Path(config.runs).exists()
