"""The event files, as TensorBoard itself reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_train.errors import EnvironmentMismatch
from hvd_train.record.reports import CheckpointReport, FaultReport, LayerReport, MachineReport, RunStart
from hvd_train.record.tensorboard import TensorBoard
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

CONFIG = 'task = "classification"\n[optim]\nlr = 0.125\n'


def start(folder: Path, round_: int = 0) -> RunStart:
    (folder / "config.toml").write_text(CONFIG)
    return dataclasses.replace(HEADER, run=str(folder), round=round_, layers=["a.weight", "a.bias"])


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in read(folder).Scalars(tag)]


def test_every_figure_is_found(tmp_path: Path) -> None:
    board = TensorBoard()
    board.record(start(tmp_path))
    board.record(dataclasses.replace(round_report(1), loss=0.5, drift=0.25))
    board.record(evaluation(1, 0.5, 0.5, 1))
    board.record(CheckpointReport(round=1, path="p", reason="best", num_bytes=5, seconds=0.25))
    board.record(
        MachineReport(
            round=1, rss_bytes=[5, 7], cpu=[1, 2], throttled=[0, 0], available_bytes=[3], sent_bytes=0
        )
    )
    board.record(
        LayerReport(
            round=1, period=10, norm=[10.0, 0.0], update=[0.1, 0.0], gradient={}, gradient_peak=[1.0, 1.0]
        )
    )
    board.record(FaultReport(round=1, kind="not_finite", ranks=(1,), message="rank 1 was not finite"))
    board.record(STOP)
    board.close()
    tags = set(read(tmp_path).Tags()["scalars"])
    assert tags == {
        *(
            f"training/{name}"
            for name in ("loss", "learning_rate", "period", "epoch", "drift", "samples_per_s")
        ),
        *(f"seconds/{phase}" for phase in round_report(1).seconds),
        *(f"evaluation/{name}" for name in (*evaluation(1, 0.5, 0.5, 1).metrics, "best", "seconds")),
        *("machine/memory_of_largest_rank", "machine/memory_left", "machine/cores_of_median_rank"),
        *("relative_step/a.weight", "checkpoint/seconds"),
    }
    assert curve(tmp_path, "training/loss") == [(1, 0.5)]
    assert curve(tmp_path, "relative_step/a.weight") == [(1, -3.0)]
    assert curve(tmp_path, "machine/memory_of_largest_rank") == [(1, 7.0)]


def test_the_configuration_is_text_and_hyperparameters(tmp_path: Path) -> None:
    board = TensorBoard()
    board.record(start(tmp_path))
    board.close()
    found = read(tmp_path)
    (text,) = found.Tensors("configuration/text_summary")
    assert "lr = 0.125" in text.tensor_proto.string_val[0].decode()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.lr" in content
    assert b"ranks" in content


def test_a_resume_continues_the_curves(tmp_path: Path) -> None:
    now = [0.0]
    for first, last, loss in ((0, 20, 1.0), (12, 15, 2.0)):
        board = TensorBoard(lambda: now[0])
        board.record(start(tmp_path, first))
        for number in range(first + 1, last + 1):
            now[0] += 1
            board.record(dataclasses.replace(round_report(number), loss=loss))
        board.close()
    losses = [(step, 1.0 if step <= 12 else 2.0) for step in range(1, 16)]
    assert curve(tmp_path, "training/loss") == losses


def test_of_quick_rounds_some_are_left_out_and_more_in_a_long_run(tmp_path: Path) -> None:
    now = [0.0]
    board = TensorBoard(lambda: now[0])
    board.record(start(tmp_path))
    for number in range(1, 41):
        now[0] = number / 8
        board.record(round_report(number))
    for number in range(41, 61):
        now[0] = 100_000 + number
        board.record(round_report(number))
    board.record(evaluation(60, 0.5, 0.5, 60))
    board.close()
    steps = [step for step, _ in curve(tmp_path, "training/loss")]
    assert steps[:20] == list(range(1, 41, 2))
    assert steps[20:] == [41]
    assert curve(tmp_path, "evaluation/error") == [(60, 0.5)]


def test_a_clock_that_is_set_back_leaves_nothing_out(tmp_path: Path) -> None:
    now = [1000.0]
    board = TensorBoard(lambda: now[0])
    board.record(start(tmp_path))
    board.record(round_report(1))
    now[0] = 10.0
    board.record(round_report(2))
    board.close()
    assert [step for step, _ in curve(tmp_path, "training/loss")] == [1, 2]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    board = TensorBoard()
    board.record(start(tmp_path))
    board.record(dataclasses.replace(round_report(1), loss=float("nan")))
    board.close()
    tags = read(tmp_path).Tags()["scalars"]
    assert "training/loss" not in tags
    assert "training/learning_rate" in tags


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'hvd_train\[tensorboard\]'"):
        TensorBoard()
