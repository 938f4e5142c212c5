"""`doctor` as a user starts it: on a job of several ranks, and alone."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import seconds
from tests.launching import AS_ROOT, PLACEMENT, mpi_abi, run, start, tool

DOCTOR = [sys.executable, "-m", "hvd_train", "doctor"]
ON_ONE_CORE = (
    "import os, sys\n"
    "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'hvd_train', 'doctor'])"
)

OTHER = {
    "openmpi": ("PMI_SIZE", "PMI_RANK", "mpiexec of MPICH or Intel MPI"),
    "mpich": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun of Open MPI"),
}
"""By MPI: what the launcher of another one sets, and what it is called."""


def test_two_ranks_of_which_one_is_bound_to_a_core() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    launch = [tool("mpirun"), *PLACEMENT[mpi_abi()]]
    job = run(
        [*launch, "-np", "1", *DOCTOR, ":", "-np", "1", sys.executable, "-c", ON_ONE_CORE], deadline_s=60
    )
    assert job.returncode == 0, job.output
    assert job.stdout.count("hvd_train doctor: 2 ranks on ") == 1
    assert [job.stdout.count(f"ok       {name} ") for name in ("python", "torch", "MPI", "runs")] == [1] * 4
    of_ranks = [line for line in job.stdout.splitlines() if re.search(r"  ranks? [\d,-]+ \(", line)]
    assert [line.split()[:4] for line in of_ranks] == [
        ["ok", "affinity", "rank", "0"],
        ["ok", "affinity", "rank", "1"],
    ]
    assert ": core " in of_ranks[1]
    unwrapped = " ".join(job.stdout.split())
    assert "connected by `ring`" in unwrapped
    assert "`auto` takes ring here. The same line without `doctor` trains." in unwrapped


def test_alone_as_json() -> None:
    job = run([*DOCTOR, "--json", "--parameters", "1000"], deadline_s=60)
    report: dict[str, Any] = json.loads(job.stdout)
    assert (job.returncode, report["errors"]) == (0, 0), job.output
    for check in report["checks"]:
        assert check["status"] in ("ok", "warning")
        assert check["seen"]
        assert bool(check["remedy"]) is (check["status"] == "warning"), check
    names = [check["name"] for check in report["checks"]]
    assert len(set(names)) == len(names)
    assert {"MPI", "mpirun", "torch", "ring in a host", "memory", "fault tolerance", "HDF5 locks"} <= set(
        names
    )
    (memory,) = (check["seen"] for check in report["checks"] if check["name"] == "memory")
    assert memory.startswith("1,000 parameters, S = 7.8 KiB: 1 rank needs 3 S")
    assert report["backend"] == "solo"
    assert "ring for several: `mpirun" in report["start"]


def test_ranks_that_are_alone() -> None:
    """A launcher of another MPI starts n processes, each of which has a world of its own."""
    size, rank, name = OTHER[mpi_abi()]
    alone = {size: "2", **AS_ROOT}
    with start(DOCTOR, env={**alone, rank: "1"}) as other:
        job = run(DOCTOR, deadline_s=60, env={**alone, rank: "0"})
        stdout, stderr = other.communicate(timeout=seconds(60))
    text = " ".join(job.stdout.split())
    assert f"{name} started this process as one of 2, but backend `mpi`" in text
    assert "sees a world of 1: the launcher belongs to another MPI" in text
    assert "Nothing would train here" in text
    assert job.returncode == 1
    assert (other.returncode, stdout) == (1, "")
    assert "hvd_train doctor:" not in stderr, "rank 0 says it"


def test_memory_is_about_that_of_a_real_training(tmp_path: Path) -> None:
    """The bounds are wide: what an allocator returns to the system differs between machines."""
    result = tmp_path / "result.json"
    argv = [sys.executable, "benchmarks/doctor_memory.py", "--models", "mlp", "--ranks", "1"]
    job = run([*argv, "--json", str(result)], deadline_s=200)
    assert job.returncode == 0, job.output
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["model"], row["ranks"]) == ("mlp", 1)
    assert 0.5 < row["ratio"] < 2, row
