"""The contract of every communicator, over hosts that share no memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.contract.test_communicators import SUITE, assert_kept, variables

pytestmark = pytest.mark.cluster

JOBS = [
    ("mpi", (2, 2)),
    ("ring", (2, 2)),
    ("ring", (1, 1, 1, 1)),
    ("ring", (3, 1)),
]


@pytest.mark.parametrize(("backend", "slots"), JOBS)
def test_every_communicator_keeps_the_contract_between_hosts(
    backend: str, slots: Sequence[int], hosts: Hosts, tmp_path: Path
) -> None:
    env = variables(backend, slots, tmp_path)
    job = hosts.run(1, mpirun(slots, SUITE, env=env), deadline_s=200, env=env)
    assert_kept(job, sum(slots))
