"""Averaged gradients where ranks are on several hosts, and averages begin within the backward pass."""

from __future__ import annotations

import re

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.launching import suite

pytestmark = pytest.mark.cluster


def test_ranks_on_two_hosts_are_one_process_with_the_joint_batch(hosts: Hosts) -> None:
    """Also gone on with by the two ranks of one host, which average all gradients at once."""
    env = {"OMP_NUM_THREADS": "1", "GRADIENTS_BACKENDS": "ring"}
    job = hosts.run(
        1, mpirun((2, 2), suite("tests/mpi/suite_gradients.py"), env=env), deadline_s=300, env=env
    )
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["8"] * 4, job.output
