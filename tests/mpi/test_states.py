"""Runs suite_states.py on four ranks."""

from __future__ import annotations

import re

from tests.launching import command, run, suite


def test_states_have_their_own_periods() -> None:
    program = suite("tests/mpi/suite_states.py")
    job = run(command("mpirun", 4, program), deadline_s=200, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["21"] * 4, job.output
