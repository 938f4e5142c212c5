"""A checkout that was never built, which hides the installed package from `python -m`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launching import ROOT, command, run
from tests.mpi.jobs import SHORT, events
from tests.mpi.test_refusals import messages

pytestmark = pytest.mark.mpi


def test_it_trains_without_the_ring_or_says_why_not(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "hvd_train", tmp_path / "hvd_train", ignore=ignored)
    env = {"PYTHONPATH": str(tmp_path)}
    job = run(
        command("mpirun", 2, ["-m", "hvd_train", "--name", "r", *SHORT]), deadline_s=90, cwd=tmp_path, env=env
    )
    assert "Traceback" not in job.output
    assert job.returncode in (0, 2), job.output
    if job.returncode == 0:
        (header,) = events(tmp_path / "runs" / "r", "header")
        assert (header["world_size"], header["backend"]) == (2, "mpi")
    else:  # it found another MPI than that of mpirun
        assert len(messages(job.output)) == 1, job.output
    named = run(
        command("mpirun", 2, ["-m", "hvd_train", "--backend", "ring", *SHORT]),
        deadline_s=90,
        cwd=tmp_path,
        env=env,
    )
    assert named.returncode == 2, named.output
    (message,) = messages(named.output)
    assert ("`ring` is not built" in message) is (job.returncode == 0), message
