"""The warning of rounds that are too long for the notice before a job's end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hvd_train.record.notice import LEAD_VARIABLE, make_notice
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

ROUND_S = 0.5 + 1.0 + 0.375 + 0.125
"""What a round of `round_report` takes."""


def said(lead_s: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    for recorder in make_notice({LEAD_VARIABLE: lead_s} if lead_s else {}):
        recorder.header(HEADER)
        for report in (round_report(1), evaluation(1, 0.2, 0.2, 1), round_report(2), STOP):
            recorder.report(report)
        recorder.close()
    return capsys.readouterr().err.splitlines()


def test_a_round_longer_than_half_the_notice_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(str(2 * ROUND_S - 0.1), capsys)
    assert line.startswith(
        "hvd_train: round 1 took 2 s, but the job is notified 3.9 s before its end; expected"
    )
    assert "Lower sync.period, or raise" in line


def test_rounds_of_equal_time_are_shortened_by_their_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    (recorder,) = make_notice({LEAD_VARIABLE: "1"})
    recorder.report(replace(round_report(1), steps=(3, 1)))
    assert "Lower sync.seconds, or raise" in capsys.readouterr().err


@pytest.mark.parametrize("lead_s", [str(2 * ROUND_S), "120", "", "soon"])
def test_otherwise_nothing_is_printed(lead_s: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(lead_s, capsys) == []
