"""Between hosts no wait is without an end either: who stops is named, and who works is waited for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.mpi.jobs import SHORT

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("backend", "what"),
    [(b, what) for b in ("ring", "mpi") for what in ("allreduce", "average", "slice step", "broadcast")],
)
def test_a_rank_that_stops_is_named_on_both_hosts(
    backend: str, what: str, hosts: Hosts, tmp_path: Path
) -> None:
    line = mpirun((2, 2), ["-m", "tests.mpi.hanging", backend, what, str(tmp_path)])
    job = hosts.run(1, line, deadline_s=90)
    assert job.returncode != 0
    for rank in range(3):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["missing"] == [3], job.output
        assert "Rank 3 (h2)" in found["text"], found


@pytest.mark.parametrize(
    ("backend", "phase"),
    [
        ("ring", "local step"),
        ("ring", "evaluation"),
        ("ring", "checkpoint"),
        ("ring", "final report"),  # found while closing: what rank 0 reports is on its way by then
        ("mpi", "local step"),
        ("mpi", "final report"),
    ],
)
def test_a_training_ends_where_the_rank_of_a_host_stops(
    backend: str, phase: str, hosts: Hosts, tmp_path: Path
) -> None:
    options = ["--backend", backend, "--runs", str(tmp_path), "--sync.stall-timeout-s", "2", *SHORT]
    job = hosts.run(
        1, mpirun((1, 1), ["-m", "tests.mpi.stopping", "stop", "1", phase, *options]), deadline_s=90
    )
    assert job.returncode != 0, job.output
    named = [line.partition("Rank 1 (h2)")[2] for line in job.output.splitlines()]
    assert any(phase in rest for rest in named), job.output


def test_a_rank_that_computes_on_a_host_of_its_own_is_waited_for(hosts: Hosts, tmp_path: Path) -> None:
    """No rank of its host waits, which could tell that it works: it tells itself."""
    program = ["-m", "tests.mpi.stopping", "compute", "1", "local step", "--runs", str(tmp_path)]
    options = ["--sync.stall-timeout-s", "1", *SHORT]
    job = hosts.run(1, mpirun((1, 1), [*program, *options]), deadline_s=120)
    assert job.returncode == 0, job.output
    assert not list(tmp_path.glob(".hvd_train-signs-*")), "the signs stay"
