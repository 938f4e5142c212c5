"""Two real jobs in one run's folder: one trains; who was taken over ends and writes nothing more."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deadlines import seconds
from tests.launching import Job, Process, command, ranks_of, run, send, start, wait_for
from tests.mpi.jobs import events, has_recorded

SLOW = ("--task", "tests/mpi/sleepy.py:Slow", "--config", "hvd_train/demo/digits.toml", "--patience", "0")
OFTEN = ("--checkpoint.every-rounds", "1", "--evaluate.every-rounds", "5")

TAKE_OVER = """
import dataclasses, sys
from hvd_train.run import claim
from hvd_train.config import Config
from hvd_train.run.directory import open_run

this_process = claim.Holder.this_process
claim.Holder.this_process = lambda environ: dataclasses.replace(this_process(environ), host="elsewhere")
claim.STALE_S = 2.0
open_run(Config(name="r", runs=sys.argv[1], resume="auto"))
"""
"""A job on a host that sees no process of this one, which ends without a release."""


@contextmanager
def training(launcher: str, ranks: int, runs: Path, *options: str) -> Iterator[Process]:
    """A long training named r that has written a checkpoint."""
    own = ("--runs", str(runs), "--name", "r", *SLOW, *OFTEN, "--max-rounds", "100000", *options)
    with start(command(launcher, ranks, ["-m", "hvd_train", *own])) as process:
        wait_for(lambda: has_recorded(runs / "r", "checkpoint", 2), 90, process)
        yield process


def second(runs: Path, *words: str, rounds: int = 100001) -> Job:
    """Another job in the same folder, to its end."""
    options = ["--runs", str(runs), "--name", "r", *SLOW, "--resume", "auto", "--max-rounds", str(rounds)]
    return run([sys.executable, "-m", "hvd_train", *words, *options], deadline_s=90)


def said(job: Job) -> list[str]:
    """Its own lines on standard error, without what an MPI adds."""
    return [line for line in job.stderr.splitlines() if line.startswith("hvd_train: ")]


@pytest.mark.mpi
def test_a_second_job_is_refused_and_a_killed_one_taken_over(tmp_path: Path) -> None:
    with training("mpirun", 2, tmp_path) as first:
        pids = ranks_of(first)
        assert len(pids) == 2
        refused = second(tmp_path)
        assert refused.returncode == 2, refused.output
        (line,) = said(refused)
        named = re.search(
            r"r is in use by process (\d+) on (\S+) \(since [-\d]+ [:\d]+\); expected one job", line
        )
        assert named, line
        assert int(named[1]) in pids
        assert named[2] == os.uname().nodename
        launched = second(tmp_path, "launch", "-np", "2", "--")
        assert launched.returncode == 2, launched.output
        assert len([line for line in said(launched) if "is in use by process" in line]) == 1
        assert "anew" not in launched.output
        assert first.poll() is None
        send(pids, signal.SIGKILL)
        first.wait(timeout=seconds(60))
    reached = max(e["round"] for e in events(tmp_path / "r", "checkpoint"))
    over = second(tmp_path, rounds=reached + 3)
    assert over.returncode == 0, over.output
    (line,) = [line for line in said(over) if "taken over" in line]
    assert f"process {named[1]} on" in line
    header, rounds = events(tmp_path / "r", "header")[-1], events(tmp_path / "r", "round")
    assert header["round"] in (reached, reached + 1), "it may be killed before it reports its last checkpoint"
    assert rounds[-1]["round"] == reached + 3
    assert len(events(tmp_path / "r", "header")) == 2, "those that were refused have left nothing"


def state(folder: Path) -> dict[str, bytes]:
    """All that is in a run's folder, but for claims."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".claim")
    }


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_that_was_taken_over_ends_and_publishes_nothing(ranks: int, tmp_path: Path) -> None:
    """The job is stopped; another one, from a host that does not see that, takes over, and it is woken."""
    with training("mpirun" if ranks == 2 else "python", ranks, tmp_path) as process:
        pids = ranks_of(process)
        send(pids, signal.SIGSTOP)
        taken = run([sys.executable, "-c", TAKE_OVER, str(tmp_path)], deadline_s=60)
        assert taken.returncode == 0, taken.output
        assert "gave no sign of life for 2 s" in taken.stderr
        before = state(tmp_path / "r")
        assert not [name for name in before if name.endswith(".tmp") or "/.round" in name]
        send(pids, signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=seconds(90))
        assert process.returncode not in (0, 2), stdout + stderr
        if ranks == 1:
            assert process.returncode == 1
        lines = [line for line in stderr.splitlines() if "hvd_train: " in line and "taken over" in line]
        assert len(lines) == 1, stderr
        assert "on elsewhere" in lines[0]
        assert "Traceback" not in stderr
    after = state(tmp_path / "r")
    prepared = {name for name in after if "/.round" in name}
    assert {name: after[name] for name in after.keys() - prepared} == before
