"""The period that follows the time of communication, on a slow network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.mpi.jobs import events

pytestmark = pytest.mark.cluster


def test_the_period_grows_on_a_slow_network(hosts: Hosts, tmp_path: Path) -> None:
    """0.7 MB in 50 ms: a local step would have to take a second for a period of 1 to be right."""
    program = ["-m", "hvd_train", "--runs", str(tmp_path), "--name", "auto", "--model.hidden", "500", "100"]
    program += ["--schedule", "auto", "--period", "1", "--max-rounds", "14", "--patience", "0"]
    for number in (1, 2):
        hosts.rate(number, "100mbit")
    try:
        job = hosts.run(1, mpirun((1, 1), program), deadline_s=120)
    finally:
        for number in (1, 2):
            hosts.norate(number)
    assert job.returncode == 0, job.output
    (change, *_) = events(tmp_path / "auto", "period")
    assert change["round"] == 11, "ten rounds are measured, and the first is left out"
    assert change["period"] > 1
    assert events(tmp_path / "auto", "round")[-1]["period"] == change["period"]
    assert change["message"].startswith("communication took ")
    assert f"every round has {change['period']} from round 12 on" in change["message"]
