"""What is looked at before the first step: versions, cores, and whether there are others at all."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

import hvd_train
from tests.launching import BIN, PLACEMENT, ROOT, command, mpi_abi, run, tool
from tests.mpi.jobs import SHORT, events
from tests.mpi.test_refusals import messages

pytestmark = pytest.mark.mpi


def test_a_host_with_another_version_is_named_before_the_ring_is_brought_up(tmp_path: Path) -> None:
    """Rank 1 really runs another copy of the package, whose ring does what rank 0's knows nothing of."""
    package = shutil.copytree(ROOT / "hvd_train", tmp_path / "other" / "hvd_train")
    version = package / "_version.py"
    version.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.9"', version.read_text()))
    with (package / "comm" / "ring.py").open("a") as ring:
        ring.write("\nraise SystemExit('the other ring was imported')\n")
    train = [sys.executable, "-m", "hvd_train", "--runs", str(tmp_path / "runs"), *SHORT]
    argv = [tool("mpirun"), *PLACEMENT[mpi_abi()], "-np", "1", "env", f"PYTHONPATH={ROOT}", *train]
    argv += [":", "-np", "1", "env", f"PYTHONPATH={package.parent}", *train]
    job = run(argv, deadline_s=60, cwd=tmp_path)
    assert job.returncode == 2, job.output
    (message,) = messages(job.output)
    assert (
        f"the ranks have different versions: hvd_train is '{hvd_train.__version__}' on rank 0 but '0.0.9' on "
        "rank 1. Install the same on every host."
    ) in message
    assert not (tmp_path / "runs").exists()


def test_ranks_that_share_one_core_and_too_many_threads_are_warned_of(tmp_path: Path) -> None:
    program = ["-m", "hvd_train", "--runs", str(tmp_path), "--threads", "3", *SHORT]
    job = run(["taskset", "-c", "0", *command("mpirun", 2, program)], deadline_s=60)
    assert job.returncode == 0, job.output
    same, threads = messages(job.output)
    assert "all ranks are bound to core 0 of" in same
    assert "-bind-to none`" in same
    assert "all ranks are set to 3 threads on 1 core. Lower `--threads`" in threads


def test_one_process_in_an_allocation_of_several_tasks_is_warned_of(tmp_path: Path) -> None:
    argv = command("python", 1, ["-m", "hvd_train", "--runs", str(tmp_path), *SHORT])
    job = run(argv, deadline_s=60, env={"SLURM_JOB_ID": "71", "SLURM_NTASKS": "8"})
    assert job.returncode == 0, job.output
    (message,) = messages(job.stderr)
    assert "the allocation has 8 tasks, and this is one process" in message


def test_a_launcher_that_sets_no_world_size_starts_one_world(tmp_path: Path) -> None:
    """prterun sets PMIX_RANK and no size: what it starts must not take itself for single processes."""
    prterun = BIN / "prterun"
    if not prterun.exists() or mpi_abi() != "openmpi":
        pytest.skip("prterun comes with Open MPI 5")
    argv = [str(prterun), "--map-by", ":oversubscribe", "--bind-to", "none", "-np", "2", sys.executable]
    job = run([*argv, "-m", "hvd_train", "--runs", str(tmp_path), "--name", "r", *SHORT], deadline_s=60)
    assert job.returncode == 0, job.output
    (header,) = events(tmp_path / "r", "header")
    assert header["world_size"] == 2
