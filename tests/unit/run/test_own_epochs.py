"""Whole trainings with sync.schedule = 'time', where every rank passes epochs of its own. The numbers of
local steps are what the clock gave; what follows from them is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import hvd_train
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, StopConfig, SyncConfig
from hvd_train.errors import HvdTrainError
from hvd_train.record.console import PlainConsole
from hvd_train.record.reports import EvaluationReport, RoundReport, StopReport
from hvd_train.record.wording import passes_of
from tests.unit.run_reports import HEADER, STOP, round_report
from tests.unit.trainings import Remembered, resumed, small, train

TIME = SyncConfig(schedule="time", seconds=0.01)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two ranks with 120 rows each, which are 30 batches."""
    return replace(small(tmp_path), sync=TIME)


def steps(recorder: Remembered) -> list[list[int]]:
    found = [r.steps for r in recorder.of(RoundReport)]
    assert all(found)
    return [[*of_ranks] for of_ranks in found if of_ranks]


def epochs_after(taken: list[int]) -> list[float]:
    return [n / 30 for n in taken]


def test_every_rank_passes_epochs_of_its_own(config: Config) -> None:
    """Until all rows have counted three times in the mean."""
    recorders = train(replace(config, stop=StopConfig(patience=0, max_epochs=3)), 2)
    assert recorders[0].start.samples_per_rank == [120, 120]
    assert [steps(r) for r in recorders] == [steps(recorders[0])] * 2
    taken, samples = [0, 0], 0
    for report, of_ranks in zip(recorders[0].of(RoundReport), steps(recorders[0]), strict=True):
        taken = [a + b for a, b in zip(taken, of_ranks, strict=True)]
        assert report.epoch == pytest.approx(sum(epochs_after(taken)) / 2)
        assert report.samples == 4 * sum(of_ranks)
        assert report.period == max(1, round(sum(of_ranks) / 2))
        samples += report.samples
    (stop,) = recorders[0].of(StopReport)
    assert (stop.reason, stop.samples) == ("max_epochs", samples)
    assert stop.passes == pytest.approx(epochs_after(taken))
    due, done = [], 0
    for report in recorders[0].of(RoundReport):
        if int(report.epoch) > done:
            due.append(report.round)
            done = int(report.epoch)
    evaluations = recorders[0].of(EvaluationReport)
    assert [e.round for e in evaluations] == due
    assert evaluations[-1].passes == stop.passes
    assert recorders[0].start.schedule == "average after as many local steps of each rank as fit into 0.01 s"


def test_a_resumed_run_goes_on_in_the_epoch_of_each_rank(config: Config) -> None:
    taken = [0, 0]
    for rounds in (3, 5, 9):
        stop = StopConfig(patience=0, max_rounds=rounds)
        recorder = train(replace(config, stop=stop, resume="auto" if rounds > 3 else ""), 2)[0]
        for of_ranks in steps(recorder):
            taken = [a + b for a, b in zip(taken, of_ranks, strict=True)]
        (end,) = recorder.of(StopReport)
        assert end.passes == pytest.approx(epochs_after(taken))


def test_other_ranks_begin_the_epoch_anew(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = train(replace(config, stop=StopConfig(patience=0, max_epochs=2)), 2)[0]
    done = int(stopped.of(RoundReport)[-1].epoch)
    assert done >= 2
    again = train(resumed(config, max_epochs=done + 1), 3)[0]
    assert (
        "the rows of the ranks, or their order, are not those of the checkpoint (other data, number of "
        f"ranks, batch size, seed, reading or order): epoch {done + 1} begins anew."
    ) in capsys.readouterr().err
    assert again.of(RoundReport)[0].epoch > done
    assert again.of(StopReport)[0].reason == "max_epochs"
    assert len(again.of(StopReport)[0].passes) == 3


@pytest.mark.parametrize("syncs", [(TIME, SyncConfig(period=5)), (SyncConfig(period=5), TIME)])
def test_another_schedule_begins_the_epoch_anew(
    syncs: tuple[SyncConfig, SyncConfig], config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = replace(config, sync=syncs[0], stop=StopConfig(patience=0, max_epochs=2))
    done = int(train(before, 2)[0].of(RoundReport)[-1].epoch)
    recorders = train(replace(resumed(config, max_epochs=done + 1), sync=syncs[1]), 2)
    assert (
        "with sync.schedule = 'time' every rank passes epochs of its own, with the others all ranks pass "
        f"them together: epoch {done + 1} begins anew."
    ) in capsys.readouterr().err
    rounds = recorders[0].of(RoundReport)
    if syncs[1] is not TIME:
        assert [r.epoch for r in rounds] == pytest.approx([done + (i + 1) * 5 / 30 for i in range(6)])
    assert recorders[0].of(StopReport)[0].reason == "max_epochs"
    assert all(r.of(RoundReport)[-1].epoch == rounds[-1].epoch for r in recorders)


def test_a_run_that_has_done_as_many_epochs_is_over(config: Config) -> None:
    train(replace(config, stop=StopConfig(patience=0, max_epochs=2)), 2)
    with pytest.raises(
        HvdTrainError, match=r"stop\.max_epochs = 2: the run has done \d+; expected a higher limit"
    ):
        train(resumed(config, max_epochs=2), 2)


def test_a_replay_has_epochs_of_its_own_as_well(config: Config) -> None:
    hvd_train.train(config, comm=SoloCommunicator())
    replayed = SyncConfig(period=3, replay_periods=f"{config.runs}/r")
    again = replace(config, name="again", sync=replayed)
    (recorder,) = train(again, 1)
    assert all(len(of_ranks) == 1 for of_ranks in steps(recorder))
    other = replace(again, name="other", data=replace(again.data, redeal="epoch"))
    with pytest.raises(HvdTrainError) as caught:
        train(other, 1)
    assert str(caught.value) == (
        "data.redeal = 'epoch': expected 'never' in a replay of a run with sync.schedule = 'time', as every "
        "rank passes epochs of its own."
    )
    with pytest.raises(HvdTrainError, match=r"of each of 1 ranks .* expected 2, the ranks of this job"):
        train(replace(again, name="more"), 2)


def test_what_the_console_prints() -> None:
    import io

    stream, now = io.StringIO(), 0.0
    console = PlainConsole(stream, lambda: now)
    console.header(replace(HEADER, schedule="average after as many local steps"))
    for number, of_ranks in enumerate(([20, 9], [20, 20]), 1):
        now += 10.0
        console.report(round_report(number, period=15, steps=of_ranks))
    console.report(replace(STOP, passes=[2.5, 1.25]))
    lines = stream.getvalue().splitlines()
    assert [line[:20] for line in lines if line.startswith("round ")] == [
        "round      1  k 9-20",
        "round      2  k   20",
    ]
    assert "passes    rank 0 2.50, rank 1 1.25 over its rows" in lines


def test_passes_of_many_ranks() -> None:
    passes = [2.0 + rank / 100 for rank in range(64)]
    passes[17] = 0.5
    assert passes_of(passes) == "rank 17 0.50 to rank 63 2.63 over its rows, median 2.31"
