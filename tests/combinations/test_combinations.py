"""docs/combinations.md is what the program does: its tables are those of the code that refuses, and every yes
runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.combinations import table
from tests.combinations.rules import RULES
from tests.faults.trials import missing
from tests.launching import command, run, suite


def test_the_tables_are_those_of_the_code() -> None:
    text = table.DOCUMENT.read_text()
    assert table.BEGIN in text
    assert table.document(text) == text, "write them again: python -m tests.combinations.table"


def passes(backend: str, *suites: str) -> int:
    """The number of tests that each of two ranks has passed, which is the same."""
    program = [
        *suite(f"tests/combinations/{suites[0]}"),
        *(f"tests/combinations/{more}" for more in suites[1:]),
    ]
    env = {"OMP_NUM_THREADS": "1", "COMBINATIONS_BACKEND": backend, "COMBINATIONS_RANKS": "2"}
    job = run(command("mpirun", 2, program), deadline_s=300, env=env)
    assert job.returncode == 0, job.output
    passed = [int(n) for n in re.findall(r"(\d+) passed", job.output)]
    assert len(passed) == 2, job.output
    assert passed[0] == passed[1], job.output
    return passed[0]


def test_every_yes_runs_over_mpi_and_the_ring() -> None:
    assert passes("mpi", "suite_backends.py", "suite_combinations.py") >= 150


def test_every_yes_runs_over_horovod() -> None:
    pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    assert passes("horovod", "suite_backends.py") == len(RULES) + 1


SAID = {
    "none": "sync.mode = 'none' cannot go on without the ranks that are lost: their models were theirs "
    "alone, and no average has them. Start again.",
    "gradients": "the state of SGD begins anew: that of the lost ranks was on them alone.",
    "ema": "the moving average begins anew: its slices of the lost ranks are gone.",
}
"""By the rules that lose something with a rank; on `mpi` outer optimizers do as well."""


def test_every_rule_but_none_goes_on_without_a_rank(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    start, *rest = command("mpirun", 3, ["-m", "tests.combinations.losing", "1", str(tmp_path)])
    job = run([start, "--with-ft", "ulfm", *rest], deadline_s=120, env={"OMP_NUM_THREADS": "1"})
    reports = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(reports) == 2, job.output
    for report in reports:
        assert report["ring"] == {rule: SAID.get(rule, "") for rule in RULES}
        outer = {rule: text for rule, text in report["mpi"].items() if "outer" in RULES[rule]}
        assert report["mpi"] == {**report["ring"], **outer}
        for rule, text in outer.items():
            kept = "slow_momentum" if rule == "slowmo" else "momentum"
            assert text.startswith(f"{kept} of the outer optimizer for 33."), text
