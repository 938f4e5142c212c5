"""Runs suite_periods.py on every rank of a real job."""

from __future__ import annotations

import re

from tests.launching import command, run, suite


def test_periods_are_exact_and_resumed() -> None:
    program = suite("tests/mpi/suite_periods.py")
    job = run(command("mpirun", 4, program), deadline_s=300, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == 4, job.output
    assert min(passed) == max(passed) >= 12, job.output
