"""An outer optimizer where ranks are on several hosts: exact, sharded, and with every wire."""

from __future__ import annotations

import json

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.cluster.outer_job import LARGEST, NUMEL, ROUNDS
from tests.cluster.test_ring_wire import HOP_ERROR

pytestmark = pytest.mark.cluster

GAIN = 0.7 * (1 + 0.9 * (1 - 0.9**ROUNDS) / (1 - 0.9))
"""What becomes of a change in the last of the rounds, and how far one moves at most, in changes."""


def test_every_wire_carries_what_the_outer_optimizer_makes(hosts: Hosts) -> None:
    slots = (2, 1)
    job = hosts.run(1, mpirun(slots, ["-m", "tests.cluster.outer_job"]), deadline_s=60)
    assert job.returncode == 0, job.output
    found = json.loads(job.stdout)
    assert set(found) == set(HOP_ERROR)
    for wire, figures in found.items():
        assert figures["hosts"] == 2
        assert figures["digests"] == 1, "all ranks hold the same bits"
        assert sum(figures["owned"]) == NUMEL, "each element has one owner"
        assert max(figures["owned"]) <= NUMEL // 2 + 1
        bound = ROUNDS * 2 * len(slots) * GAIN * LARGEST * HOP_ERROR[wire]
        assert figures["error"] <= bound + 1e-5, wire
