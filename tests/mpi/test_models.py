"""Runs suite_models.py on every rank of a real job."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np

from tests.launching import command, run


def write(path: Path, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file["inputs"] = generator.normal(size=(rows, 6)).astype(np.float32)
        file["targets"] = generator.integers(0, 3, rows)


def test_unusual_models(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "0.h5", 33, 0)
    write(tmp_path / "data" / "1.h5", 32, 1)
    write(tmp_path / "v.h5", 33, 2)
    program = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--color=no",
        "--tb=short",
        "tests/mpi/suite_models.py",
    ]
    env = {"SUITE_RANKS": "2", "SUITE_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    job = run(command("mpirun", 2, program), deadline_s=280, env=env)
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == 2, job.output
    assert min(passed) == max(passed) >= 40, job.output
