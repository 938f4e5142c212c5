"""Runs suite_outer.py on four ranks; and whole trainings with an outer optimizer under a real launcher."""

from __future__ import annotations

import re
from pathlib import Path

from tests.launching import command, run, suite
from tests.mpi.jobs import events, train
from tests.unit.outer_checkpoints import check_nesterov

DIGITS = ("--config", "hvd_train/demo/digits.toml", "--patience", "0", "--threads", "1")
EVERY = ("--checkpoint.every-rounds", "1", "--checkpoint.keep", "50", "--sync.outer", "nesterov")


def test_four_ranks_are_one_process_with_four_replicas() -> None:
    program = suite("tests/mpi/suite_outer.py")
    job = run(command("mpirun", 4, program), deadline_s=200, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["12"] * 4, job.output


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Every round follows from the saved model and momentum of the one before, in shared memory too."""
    train("mpirun", 2, tmp_path, "--name", "r", *DIGITS, *EVERY, "--max-rounds", "4")
    train("mpirun", 3, tmp_path, "--resume", str(tmp_path / "r"), "--max-rounds", "8")
    check_nesterov(tmp_path / "r", rounds=8, lr=0.7, momentum=0.9)
    assert [e["round"] for e in events(tmp_path / "r", "checkpoint")] == list(range(1, 9))
