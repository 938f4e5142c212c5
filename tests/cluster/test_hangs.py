"""A rank that hangs is named by all that wait for it, on its host and on another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("what", ["allreduce", "average"])
def test_a_rank_that_hangs_is_named(what: str, hosts: Hosts, tmp_path: Path) -> None:
    line = mpirun((2, 2), ["-m", "tests.mpi.hanging", "ring", what, str(tmp_path)])
    job = hosts.run(1, line, deadline_s=90)
    assert job.returncode != 0
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text())["missing"] == [3], job.output
