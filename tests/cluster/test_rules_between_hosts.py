"""Every rule with every wire, where something is sent: a part of what docs/combinations.md says."""

from __future__ import annotations

import json

import pytest

from hvd_train.comm.ring import WIRES
from tests.cluster.hosts import Hosts, mpirun
from tests.combinations.rules import RULES
from tests.combinations.table import refused_on

pytestmark = pytest.mark.cluster


def test_every_rule_runs_with_every_wire(hosts: Hosts) -> None:
    job = hosts.run(1, mpirun((2, 1), ["-m", "tests.cluster.rules_job"]), deadline_s=120)
    assert job.returncode == 0, job.output
    going = [[2, wire, rule] for wire in WIRES for rule in RULES if not refused_on(rule, "ring", wire)]
    assert json.loads(job.stdout) == going
