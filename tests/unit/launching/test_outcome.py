"""The exit code of a launch: the run's own record decides, whatever the launcher said."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from hvd_train.launching.launch import exit_status
from hvd_train.launching.outcome import Outcome
from hvd_train.launching.supervise import Ended


def append(run: Path, *events: dict[str, object], torn: str = "") -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + torn)


HEADER = {"event": "header"}


def stop(reason: str, missing: str = "") -> dict[str, object]:
    return {"event": "stop", "reason": reason, "missing": missing}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was interrupted before, and whose last line a kill has torn."""
    append(tmp_path, HEADER, stop("interrupted"), torn='{"event": "ro')
    return tmp_path


def code(record: Outcome, status: int, number: int = 0) -> int:
    return exit_status(Ended(status=status, signal=number), record, "mpirun", ["-np", "2"])


@pytest.mark.parametrize(
    ("reason", "status", "expected"),
    [
        ("patience", 0, 0),
        ("max_rounds", 1, 0),
        ("diverged", 3, 3),
        ("diverged", 0, 3),
        ("interrupted", 0, 75),
        ("interrupted", 143, 75),
        ("", 0, 1),
        ("", 1, 1),
        ("", 137, 1),
        ("", 2, 2),
    ],
)
def test_the_record_takes_precedence(
    reason: str, status: int, expected: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Outcome(run)
    assert not record.has_begun()
    (run / "events.jsonl").write_text("".join((run / "events.jsonl").read_text().splitlines(True)[:2]))
    append(run, HEADER, {"event": "round"}, *([stop(reason)] if reason else []), torn='{"event"')
    assert record.has_begun()
    assert code(record, status) == expected
    said = capsys.readouterr().err
    assert ("the run did not finish" in said) is (expected == 1)
    assert (f"Go on: python -m hvd_train launch -np 2 -- --resume {run}" in said) is (expected == 75)
    assert ("but the run had finished" in said) is (expected == 0 and status != 0)
    assert ("the training diverged" in said) is (expected == 3)


@pytest.mark.parametrize("reason", ["interrupted", "patience", "diverged"])
def test_an_end_that_is_not_on_disk_is_a_failure(
    reason: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Outcome(run)
    missing = "the model of the end (round 12) could not be saved: No space. On disk: latest is of round 8."
    (run / "events.jsonl").write_text("".join((run / "events.jsonl").read_text().splitlines(True)[:2]))
    append(run, HEADER, stop(reason, missing))
    (run / "checkpoints" / "round-8").mkdir(parents=True)
    (run / "checkpoints" / "round-8" / "manifest.json").touch()
    assert code(record, 1) == 1
    said = capsys.readouterr().err
    assert f"the run ended ({reason}), but {missing} Its newest checkpoint is round-8. Go on: " in said
    assert "with a checkpoint" not in said


def test_a_failure_names_the_checkpoint_to_go_on_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(Outcome(run), 0) == 1
    said = capsys.readouterr().err
    assert f"mpirun ended with 0, and {run / 'events.jsonl'} has no `stop`. There is no checkpoint" in said
    (run / "checkpoints" / "round-8").mkdir(parents=True)
    (run / "checkpoints" / "round-8" / "manifest.json").touch()
    assert code(Outcome(run), 0) == 1
    said = capsys.readouterr().err
    assert f"newest checkpoint is round-8. Go on: python -m hvd_train launch -np 2 -- --resume {run}" in said


def test_a_job_that_was_ended_at_once_has_the_code_of_the_signal(run: Path) -> None:
    assert code(Outcome(run), 1, number=signal.SIGINT) == 130


def test_the_end_of_the_job_that_has_the_folder_is_not_that_of_one_it_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """horovodrun over Gloo turns the 2 of the ranks into 1."""
    record = Outcome(run)
    append(run, {"event": "round"}, stop("patience"))
    assert record.stop() == {}
    assert code(record, 1) == 1
    assert "no training began" in capsys.readouterr().err
    assert code(record, 2) == 2


def test_no_resume_is_suggested_without_an_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Outcome(tmp_path)
    append(tmp_path, HEADER, stop("interrupted"))
    exit_status(Ended(status=0, signal=0), record, "mpirun", [], resumable=False)
    said = capsys.readouterr().err
    assert "Go on" not in said
    assert "With sync.mode = 'none' it cannot go on." in said


def test_a_run_that_does_not_exist_yet(tmp_path: Path) -> None:
    record = Outcome(tmp_path / "runs" / "a")
    assert not record.has_begun()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    append(tmp_path / "runs" / "a", HEADER, stop("patience"))
    assert record.stop()["reason"] == "patience"


def test_the_ranks_have_connected_once_the_configuration_or_a_header_is_written(tmp_path: Path) -> None:
    """What was there before does not count."""
    run = tmp_path
    append(run, HEADER)
    (run / "config.toml").write_text("seed = 0\n")
    record, other = Outcome(run), Outcome(run)
    assert not record.ranks_have_met()
    append(run, HEADER)
    assert record.ranks_have_met()
    (run / "new").write_text("seed = 0\n")
    (run / "new").replace(run / "config.toml")
    assert other.ranks_have_met()
    fresh = Outcome(run / "fresh")
    assert not fresh.ranks_have_met()
    (run / "fresh").mkdir()
    (run / "fresh" / "config.toml").touch()
    assert fresh.ranks_have_met()
