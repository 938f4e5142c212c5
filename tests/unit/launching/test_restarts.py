"""Which starts of a run were in vain, by its events alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.launching.restarts import StartsSoFar, progress
from hvd_train.record.events import EventLog
from hvd_train.record.reports import CheckpointReport
from tests.deadlines import seconds
from tests.launching import ROOT, environment
from tests.unit.run_reports import HEADER, round_report

Starts = list[tuple[int, list[int]]]


def event(kind: str, number: int) -> dict[str, object]:
    return {"event": kind, "round": number}


def events_of(starts: Starts) -> list[dict[str, object]]:
    """Each start: the round that it goes on from, and the rounds of its checkpoints."""
    found = []
    for begin, checkpoints in starts:
        found += [event("header", begin), event("round", begin + 1)]
        found += [event("checkpoint", number) for number in checkpoints]
        found += [event("round", begin + 99), event("evaluation", begin + 99)]
    return found


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([], (0, 0)),
        ([(0, [])], (0, 1)),
        ([(0, [])] * 3, (0, 3)),
        ([(0, [5])], (5, 0)),
        ([(0, [5, 10]), (10, [])], (10, 1)),
        ([(0, [5, 10]), (10, []), (10, [])], (10, 2)),
        ([(0, []), (0, []), (0, [5])], (5, 0)),
        ([(0, [10]), (10, []), (10, []), (10, [15]), (15, [])], (15, 1)),
        # The best of round 5 was written after round 10: there was no room for it before.
        ([(0, [10, 5])], (10, 0)),
        # An older checkpoint, since the newest was damaged; or a run that its user put back.
        ([(0, [5, 10]), (10, []), (5, [])], (5, 2)),
    ],
)
def test_starts_without_a_later_checkpoint_do_not_count(starts: Starts, expected: tuple[int, int]) -> None:
    round_, without_progress = expected
    assert progress(events_of(starts)) == StartsSoFar(round_, len(starts), without_progress)


def test_a_run_that_diverged_is_not_started_again() -> None:
    events = events_of([(0, [5])])
    stop = {"event": "stop", "round": 7, "reason": "diverged"}
    assert progress([*events, stop]) == StartsSoFar(5, 1, 0, diverged=True)
    again = [*events, stop, event("header", 5)]
    assert progress(again) == StartsSoFar(5, 2, 1), "it was resumed, with another learning rate perhaps"
    assert progress([*again, {**stop, "reason": "patience"}]) == StartsSoFar(5, 2, 1)


def restarts(*args: str, cwd: Path, job: str = "") -> subprocess.CompletedProcess[str]:
    env = environment({"PYTHONPATH": str(ROOT)}) | ({"SLURM_JOB_ID": job} if job else {})
    line = [sys.executable, "-m", "hvd_train", "restarts", *args]
    return subprocess.run(
        line, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds(60), check=False
    )


def record(folder: Path, starts: Starts) -> None:
    folder.mkdir(parents=True)
    for begin, checkpoints in starts:
        log = EventLog(folder / "events.jsonl")
        log.header(dataclasses.replace(HEADER, round=begin))
        log.report(round_report(begin + 1))
        for number in checkpoints:
            log.report(CheckpointReport(round=number, path="", reason="every", num_bytes=1, seconds=0.1))
        log.close()


def test_the_command_reads_the_run_that_the_options_name(tmp_path: Path) -> None:
    record(tmp_path / "runs" / "17", [(0, [5]), (5, []), (5, []), (5, [])])
    worth = restarts("--limit", "4", cwd=tmp_path, job="17")
    assert (worth.returncode, worth.stderr) == (0, "")
    assert worth.stdout == "runs/17: another start goes on from round 5\n"
    over = restarts("--", "--name", "17", "--patience", "3", cwd=tmp_path)
    assert over.returncode == 1
    assert over.stdout.startswith("runs/17: 3 starts in a row resumed from round 5 and wrote no later")
    begun = restarts("--begun", "--", "--name", "17", cwd=tmp_path)
    assert (begun.returncode, begun.stdout) == (0, "4\n")
    assert restarts("--begun", "--", "--name", "18", cwd=tmp_path).stdout == "0\n"
    fresh = restarts("--", "--runs", "other", cwd=tmp_path, job="17")
    assert (fresh.returncode, fresh.stdout) == (0, "other/17: another start goes on from round 0\n")
    assert not (tmp_path / "other").exists()


def test_unknown_options_are_for_the_training(tmp_path: Path) -> None:
    for args, message in (
        (["--limit", "0"], "--limit 0: expected 1 or more"),
        (["--", "--period", "0"], "period"),
        (["--limt", "3"], "limt"),
        ([], "expected --name NAME, or a Slurm job"),
    ):
        refused = restarts(*args, cwd=tmp_path)
        assert refused.returncode == 2
        assert message in refused.stderr
