"""A rank is killed in the slice step of an outer optimizer, whose state the others go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.outer_state import FATAL, ROUNDS
from tests.launching import command, run


@pytest.mark.usefixtures("fault_tolerance")
def test_the_others_go_on_with_the_momentum(tmp_path: Path) -> None:
    """With all of it where they share memory with the rank that was lost; else without the slice of that."""
    start, *rest = command("mpirun", 4, ["-m", "tests.faults.outer_state", "0", str(tmp_path)])
    job = run([start, "--with-ft", "ulfm", *rest], deadline_s=120, env={"OMP_NUM_THREADS": "1"})
    reports = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(reports) == 3, job.output
    for report in reports:
        for name in ("ring", "mpi"):
            errors = report[name]["errors"]
            assert len(errors) == ROUNDS + 1, report
            assert max(errors) < 1e-10, report
            assert report[name]["steps"] == FATAL, report
        assert report["ring"]["lost"] == ""
        assert report["mpi"]["lost"] == (
            "momentum of the outer optimizer for 25.1% of the parameters was on lost ranks alone: it begins "
            "again at 0."
        )
