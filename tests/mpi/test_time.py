"""Runs suite_time.py on every rank of a real job."""

from __future__ import annotations

import re

from tests.launching import command, run, suite


def test_rounds_of_equal_time_are_exact_and_replayed() -> None:
    program = suite("tests/mpi/suite_time.py")
    job = run(command("mpirun", 4, program), deadline_s=300, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert passed == [3] * 4, job.output
