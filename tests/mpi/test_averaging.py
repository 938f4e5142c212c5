"""Runs suite_averaging.py on every rank of real jobs."""

from __future__ import annotations

import re

import pytest

from tests.launching import command, run, suite


@pytest.mark.parametrize("ranks", [2, 4])
def test_averaging_keeps_its_promises(ranks: int) -> None:
    program = suite("tests/mpi/suite_averaging.py")
    env = {"SUITE_RANKS": str(ranks), "OMP_NUM_THREADS": "1"}
    job = run(command("mpirun", ranks, program), deadline_s=200, env=env)
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == ranks, job.output
    assert min(passed) == max(passed) >= 18, job.output
