"""`hvd_train launch` on this host, with the MPI that the package was built for: ranks, signals, statuses."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.deadlines import seconds
from tests.launching import (
    Process,
    assert_nothing_is_left,
    command,
    environment,
    ranks_of,
    run,
    start,
    tool,
    wait_for,
)
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
        out, said = process.communicate(timeout=seconds(60))
        assert process.returncode == 75, out + said
        assert_nothing_is_left(process, 5)
    line = said.partition("Go on: python ")[2].strip()
    assert line == f"-m hvd_train launch -np 2 -- --resume {tmp_path / 'a'}"
    (stop,) = events(tmp_path / "a", "stop")
    assert stop["reason"] == "interrupted"
    done = run([sys.executable, *line.split(), "--max-rounds", str(stop["round"] + 2)], deadline_s=90)
    assert done.returncode == 0, done.output
    assert events(tmp_path / "a", "stop")[-1]["round"] == stop["round"] + 2


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS, *LONG_ROUND]) as process:
        wait_for_event(process, tmp_path / "a", "header")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("SIGINT: the run ends after its round" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=seconds(30))
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
        ranks = ranks_of(process)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, said = process.communicate(timeout=seconds(60))
        assert process.returncode == 1, said
        assert "the run did not finish: mpirun ended with " in said
        assert "Its newest checkpoint is round-" in said
        assert_nothing_is_left(process, 5)


def test_an_interruption_without_its_checkpoint_is_a_failure(tmp_path: Path) -> None:
    """There is no room for it: the ranks cannot make a file as large as that."""
    every = ("--checkpoint.every-rounds", "5", "--model.hidden", "500", "100")
    with start([*LAUNCH, "--", "--runs", str(tmp_path), "--name", "a", *ENDLESS, *every]) as process:
        wait_for_event(process, tmp_path / "a", "checkpoint")
        for pid in ranks_of(process):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
        before = events(tmp_path / "a", "checkpoint")[-1]["round"]
        wait_for(lambda: has_recorded(tmp_path / "a", "fault"), 120, process)
        process.send_signal(signal.SIGTERM)
        out, said = process.communicate(timeout=seconds(60))
        assert process.returncode == 1, out + said
        assert_nothing_is_left(process, 5)
    (stop,) = events(tmp_path / "a", "stop")
    newest = events(tmp_path / "a", "checkpoint")[-1]["round"]
    assert before <= newest < stop["round"]
    assert stop["missing"].startswith(
        f"the model of the end (round {stop['round']}) could not be saved: rank 0 ("
    )
    assert (
        f"the run ended (interrupted), but {stop['missing']} Its newest checkpoint is round-{newest}" in said
    )
    assert "interrupted, with a checkpoint" not in said
    assert said.count("hvd_train: ") >= 2, "the ranks said it, too"


def test_a_training_that_diverged_has_a_status_of_its_own(tmp_path: Path) -> None:
    """By the ranks, as their launcher passes it on, and by `launch`."""
    diverges = ["--runs", str(tmp_path), "--lr", "1e30", "--patience", "0", "--max-rounds", "9"]
    ranks = run(command("mpirun", 2, ["-m", "hvd_train", *diverges, "--name", "a"]), deadline_s=90)
    assert ranks.returncode == 3, ranks.output
    launched = run([*LAUNCH, "--", *diverges, "--name", "b"], deadline_s=90)
    assert launched.returncode == 3, launched.output
    assert "the training diverged" in launched.stderr
    for name in ("a", "b"):
        (stop,) = events(tmp_path / name, "stop")
        assert (stop["reason"], stop["missing"]) == ("diverged", "")
    assert "load it" not in ranks.stdout


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


def test_a_start_that_hangs_is_ended(tmp_path: Path) -> None:
    """An ssh that never comes back, to a host that is not this one."""
    (tmp_path / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "ssh").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{environment()['PATH']}"
    launch = [sys.executable, "-m", "hvd_train", "launch", "--hosts", "elsewhere:2", "--start-timeout", "2"]
    training = ["--", "--runs", str(tmp_path), "--name", "a", *SHORT]
    job = run([*launch, *training], deadline_s=60, env={"PATH": path})
    assert job.returncode == 1, job.output
    assert "the ranks have not connected within 2 s (--start-timeout); the job ends" in job.stderr
    assert "Still running here: " in job.stderr


def test_it_finds_mpirun_on_any_path(tmp_path: Path) -> None:
    """With entries that are too long, empty, relative, a file, or closed to this user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    (tmp_path / "file").touch()
    odd = [f"/{'x' * 300}", str(closed / "bin"), "", "relative/bin", str(tmp_path / "file"), "/\udcff"]
    line = [*LAUNCH, "--dry-run", "--", "--name", "a"]
    usual = run(line, deadline_s=60, cwd=tmp_path)
    with_odd = run(
        line, deadline_s=60, cwd=tmp_path, env={"PATH": os.pathsep.join([*odd, environment()["PATH"]])}
    )
    assert usual.returncode == 0, usual.output
    assert (with_odd.returncode, with_odd.stdout) == (0, usual.stdout), with_odd.output
