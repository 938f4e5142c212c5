"""Runs suite_communicator.py on every rank of real jobs: each backend, several world sizes and launchers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launching import Job, command, run, suite

JOBS = [
    ("solo", "python", 1),
    ("mpi", "mpirun", 3),
    ("mpi", "mpirun", 4),
    ("ring", "mpirun", 1),
    ("ring", "mpirun", 2),
    ("ring", "mpirun", 4),
    ("ring", "horovodrun-gloo", 2),
    ("horovod", "horovodrun-gloo", 2),
]
MORE_JOBS = [("mpi", "mpirun", 1), ("mpi", "mpirun", 2), ("horovod", "mpirun", 3)]
"""Of tests/mpi/test_more_communicators.py, which is one of the long tests."""

SUITE = suite("tests/contract/suite_communicator.py")
"""What each rank of a job runs, as arguments of Python."""


def variables(backend: str, hosts: Sequence[int], meeting: Path) -> dict[str, str]:
    """What the suite is told: the backend, and the number of ranks of each host."""
    return {
        "CONTRACT_BACKEND": backend,
        "CONTRACT_HOSTS": ",".join(map(str, hosts)),
        "CONTRACT_MEETING": str(meeting),
        "OMP_NUM_THREADS": "1",
    }


def assert_kept(job: Job, ranks: int) -> None:
    """The suite passed, whole, on every rank."""
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == ranks, job.output
    assert len(set(passed)) == 1, job.output
    assert passed[0] >= 20, job.output


def keeps_the_contract(backend: str, launcher: str, ranks: int, folder: Path) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    env = variables(backend, [ranks], folder)
    job = run(command(launcher, ranks, SUITE), deadline_s=200, env=env)
    assert_kept(job, ranks)


@pytest.mark.parametrize(("backend", "launcher", "ranks"), JOBS)
def test_every_communicator_keeps_the_contract(
    backend: str, launcher: str, ranks: int, tmp_path: Path
) -> None:
    keeps_the_contract(backend, launcher, ranks, tmp_path)
