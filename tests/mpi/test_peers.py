"""Runs suite_peers.py on four ranks, which gloo connects besides MPI."""

from __future__ import annotations

import re
from pathlib import Path

from tests.launching import command, run, suite


def test_averages_are_those_of_torch(tmp_path: Path) -> None:
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PEERS_STORE": str(tmp_path / "store")}
    job = run(command("mpirun", 4, suite("tests/mpi/suite_peers.py")), deadline_s=200, env=env)
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["10"] * 4, job.output
