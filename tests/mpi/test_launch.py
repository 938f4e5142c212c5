"""`hvd_train launch` on this host, with the MPI that the package was built for: ranks, signals, statuses."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.launching import Process, assert_nothing_is_left, members, run, start, tool, wait_for
from tests.mpi.jobs import SHORT, events, has_recorded

pytestmark = pytest.mark.mpi

LAUNCH = [sys.executable, "-m", "hvd_train", "launch", "-np", "2"]
LONG_ROUND = ("--period", "1000000")
ENDLESS = ("--max-rounds", "1000000", "--patience", "0")


def wait_for_event(process: Process, folder: Path, kind: str) -> None:
    wait_for(lambda: has_recorded(folder, kind), 90, process)


def test_the_line_that_it_prints_is_one_that_runs(tmp_path: Path) -> None:
    training = ["--", "--runs", str(tmp_path), "--name", "a", *SHORT]
    printed = run([*LAUNCH, "--dry-run", *training], deadline_s=60)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert not (tmp_path / "a").exists()
    job = run(shlex.split(printed.stdout), deadline_s=90)
    assert job.returncode == 0, job.output
    assert "2 ranks on 1 host" in job.stdout
    assert events(tmp_path / "a", "stop")[0]["reason"] == "max_rounds"


def test_a_signal_interrupts_it_and_a_resume_finishes_it(tmp_path: Path) -> None:
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS]) as process:
        wait_for_event(process, tmp_path / "a", "round")
        process.send_signal(signal.SIGUSR1)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 75, out + said
        assert_nothing_is_left(process, 5)
    command = said.partition("Go on: python ")[2].strip()
    assert command == f"-m hvd_train launch -np 2 -- --resume {tmp_path / 'a'}"
    (stop,) = events(tmp_path / "a", "stop")
    assert stop["reason"] == "interrupted"
    done = run([sys.executable, *command.split(), "--max-rounds", str(stop["round"] + 2)], deadline_s=90)
    assert done.returncode == 0, done.output
    assert events(tmp_path / "a", "stop")[-1]["round"] == stop["round"] + 2


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS, *LONG_ROUND]) as process:
        wait_for_event(process, tmp_path / "a", "header")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "SIGINT: the run ends after its round" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGINT, said
        assert "There is no checkpoint: start it anew" in said
        assert_nothing_is_left(process, 5)


def test_nothing_outlives_it_when_it_is_killed(tmp_path: Path) -> None:
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS]) as process:
        wait_for_event(process, tmp_path / "a", "round")
        process.kill()
        assert_nothing_is_left(process, 20)


def test_a_killed_rank_is_a_failure(tmp_path: Path) -> None:
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS]) as process:
        wait_for_event(process, tmp_path / "a", "checkpoint")
        line = f"{sys.executable}\0-m\0hvd_train\0--runs"
        ranks = [p for p in members(process.mark) if Path(f"/proc/{p}/cmdline").read_text().startswith(line)]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "the run did not come to its end: mpirun ended with " in said
        assert "Its newest checkpoint is round-" in said
        assert_nothing_is_left(process, 5)


def test_horovodrun_over_gloo_says_2_as_well(tmp_path: Path) -> None:
    """It turns every status into 1 itself; what any rank would refuse is refused before."""
    tool("horovodrun")
    launch = [*LAUNCH, "--launcher", "horovodrun", "--gloo", "--", "--runs", str(tmp_path), "--name", "a"]
    done = run([*launch, *SHORT], deadline_s=90)
    assert done.returncode == 0, done.output
    again = run([*launch, *SHORT], deadline_s=30)
    assert again.returncode == 2
    assert "a exists already; expected a new name" in again.stderr


def test_the_bench_has_the_launchers_status() -> None:
    job = run(
        [*LAUNCH, "--", "bench", "allreduce", "--sizes", "64B", "--backends", "mpi", "--repeat", "3"],
        deadline_s=90,
    )
    assert job.returncode == 0, job.output
    assert "64 B" in job.stdout
