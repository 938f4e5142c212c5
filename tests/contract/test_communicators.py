"""Runs suite_communicator.py on every rank of real jobs: each backend, several world sizes and launchers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launching import command, run

JOBS = [
    ("solo", "python", 1),
    ("mpi", "mpirun", 1),
    ("mpi", "mpirun", 2),
    ("mpi", "mpirun", 3),
    ("mpi", "mpirun", 4),
    ("ring", "mpirun", 1),
    ("ring", "mpirun", 2),
    ("ring", "mpirun", 4),
    ("ring", "horovodrun-gloo", 2),
    ("horovod", "mpirun", 3),
    ("horovod", "horovodrun-gloo", 2),
]


@pytest.mark.parametrize(("backend", "launcher", "ranks"), JOBS)
def test_every_communicator_keeps_the_contract(
    backend: str, launcher: str, ranks: int, tmp_path: Path
) -> None:
    if backend == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    program = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "-x",
        "--color=no",
        "--tb=short",
        "tests/contract/suite_communicator.py",
    ]
    env = {
        "CONTRACT_BACKEND": backend,
        "CONTRACT_RANKS": str(ranks),
        "CONTRACT_MEETING": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    job = run(command(launcher, ranks, program), deadline_s=200, env=env)
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == ranks, job.output
    assert len(set(passed)) == 1, job.output
    assert passed[0] >= 20, job.output
