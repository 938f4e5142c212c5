"""The project that `hvd_train init` writes, on a real Slurm: unedited but for slurm/site.sh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hvd_train.tools.init import main
from tests.cluster.slurm import Slurm
from tests.mpi.jobs import SHORT, events

pytestmark = pytest.mark.cluster

FAST = (*SHORT, "--threads", "1")
"""Hosts that share the cores of one machine do not know of each other."""


def test_its_batch_job_trains(tmp_path: Path, slurm: Slurm) -> None:
    folder = tmp_path / "project"
    assert main([str(folder)]) == 0
    site = folder / "slurm" / "site.sh"
    before = site.read_text()
    after = before.replace("# VENV=$HOME/envs/train\n", f"VENV={sys.prefix}\n")
    assert after != before
    site.write_text(after)
    options = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1")
    job = slurm.sbatch(*options, "slurm/train.sh", "--config", "run.toml", *FAST, cwd=folder)
    slurm.wait(job, "COMPLETED", log=folder / f"hvd_train-{job}.log")
    (header,) = events(folder / "runs" / job, "header")
    assert (header["world_size"], len(header["hosts"])) == (2, 2)
    assert header["task"] == "task.py:MyTask"
    (stop,) = events(folder / "runs" / job, "stop")
    assert stop["best"] < 0.6, "one of ten classes by chance would be 0.9"
