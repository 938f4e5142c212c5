"""Runs suite_gradients.py on four ranks."""

from __future__ import annotations

import re

from tests.launching import command, run, suite


def test_four_ranks_are_one_process_with_the_joint_batch() -> None:
    program = suite("tests/mpi/suite_gradients.py")
    job = run(command("mpirun", 4, program), deadline_s=200, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["12"] * 4, job.output
