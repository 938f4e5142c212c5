"""A rank that hangs is named by all that wait for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import command, run
from tests.mpi.hanging import TIMEOUT_S


@pytest.mark.parametrize("what", ["allreduce", "average"])
@pytest.mark.parametrize(("backend", "ranks"), [("mpi", 3), ("ring", 3)])
def test_a_rank_that_hangs_is_named(backend: str, ranks: int, what: str, tmp_path: Path) -> None:
    program = ["-m", "tests.mpi.hanging", backend, what, str(tmp_path)]
    job = run(command("mpirun", ranks, program), deadline_s=60)
    assert job.returncode != 0
    for rank in range(ranks - 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["missing"] == [ranks - 1], found
        assert TIMEOUT_S <= found["seconds"] < 4 * TIMEOUT_S, found
