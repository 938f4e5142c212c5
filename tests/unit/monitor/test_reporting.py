"""The report that a run writes at its end, if it is asked to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hvd_train.app import train
from hvd_train.config import Config, RecordConfig, StopConfig
from hvd_train.errors import UserError
from hvd_train.monitor import report
from tests.unit.trainings import small


def configuration(folder: Path) -> Config:
    record, stop = RecordConfig(report=True), StopConfig(max_rounds=2)
    return dataclasses.replace(small(folder), runs=str(folder / "runs"), name="r", record=record, stop=stop)


def test_a_run_writes_its_report(tmp_path: Path) -> None:
    result = train(configuration(tmp_path))
    html = (result.run / "report.html").read_text()
    assert "stop (max_rounds)" in html
    assert 'id="chart-error"' in html


def test_without_what_draws_it_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_train.monitor.web.pages.find_spec", lambda name: None)
    with pytest.raises(UserError, match="plotly is not installed"):
        train(configuration(tmp_path))
    assert not (tmp_path / "runs" / "r").exists()


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "report", full)
    assert train(configuration(tmp_path)).reason == "max_rounds"
    assert "the report could not be written: [Errno 28] No space left on device" in capsys.readouterr().err
