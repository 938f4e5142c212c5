"""No wait is without an end: a rank that stops is named by the others, and one that works is waited for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import command, run
from tests.mpi.hanging import CALLS, TIMEOUT_S
from tests.mpi.jobs import SHORT

LAUNCHERS = {"ring": "mpirun", "mpi": "mpirun", "horovod": "horovodrun-gloo"}
IN_MPI = ("allreduce", "average", "slice step", "barrier", "close")
IN_HOROVOD = ("allreduce", "broadcast")
"""Of calls that wait by the same means one."""


@pytest.mark.parametrize(
    ("backend", "what"),
    [
        *(("ring", what) for what in CALLS),
        *(("mpi", what) for what in IN_MPI),
        *(("horovod", what) for what in IN_HOROVOD),
    ],
)
def test_a_rank_that_stops_is_named_in_every_call(backend: str, what: str, tmp_path: Path) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    program = ["-m", "tests.mpi.hanging", backend, what, str(tmp_path)]
    job = run(command(LAUNCHERS[backend], 3, program), deadline_s=90)
    assert job.returncode != 0
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["missing"] == [2], found
        assert found["seconds"] >= TIMEOUT_S, found
        assert "Rank 2 (" in found["text"], found


@pytest.mark.parametrize(
    ("backend", "phase"),
    [
        ("ring", "set-up"),
        ("ring", "reading"),
        ("ring", "local step"),
        ("ring", "header"),
        ("ring", "evaluation"),
        ("ring", "checkpoint"),
        ("ring", "final report"),
        ("mpi", "local step"),
        ("mpi", "checkpoint"),
        ("horovod", "local step"),
        ("horovod", "evaluation"),
    ],
)
def test_a_training_ends_where_a_rank_stops(backend: str, phase: str, tmp_path: Path) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    options = ["--backend", backend, "--runs", str(tmp_path), "--sync.stall-timeout-s", "2", *SHORT]
    program = ["-m", "tests.mpi.stopping", "stop", "1", phase, *options]
    job = run(command(LAUNCHERS[backend], 2, program), deadline_s=90)
    assert job.returncode != 0, job.output
    named = [line.partition("Rank 1 (")[2] for line in job.output.splitlines()]
    assert any(phase in rest and "made no progress for 2 s" in rest for rest in named), job.output


def test_a_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    program = ["-m", "tests.mpi.stopping", "sleep", "1", "local step", "--runs", str(tmp_path)]
    job = run(command("mpirun", 2, [*program, "--sync.stall-timeout-s", "2", *SHORT]), deadline_s=90)
    assert job.returncode != 0
    assert "Rank 1 (" in job.output


def test_a_rank_that_computes_is_waited_for(tmp_path: Path) -> None:
    """Ten times as long as the limit, in one step, holding Python's lock."""
    program = ["-m", "tests.mpi.stopping", "compute", "1", "local step", "--runs", str(tmp_path)]
    job = run(command("mpirun", 2, [*program, "--sync.stall-timeout-s", "1", *SHORT]), deadline_s=120)
    assert job.returncode == 0, job.output


def test_a_step_without_an_end_has_a_limit_of_its_own(tmp_path: Path) -> None:
    program = ["-m", "tests.mpi.stopping", "spin", "1", "local step", "--runs", str(tmp_path)]
    limits = ["--sync.stall-timeout-s", "2", "--sync.step-timeout-s", "4"]
    job = run(command("mpirun", 2, [*program, *limits, *SHORT]), deadline_s=90)
    assert job.returncode != 0
    assert "Rank 1 (" in job.output
