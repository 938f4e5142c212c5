"""Runs suite_gradients.py and suite_warm_up.py on four ranks; and whole trainings with averaged gradients
under a launcher."""

from __future__ import annotations

import re
from pathlib import Path

from tests.launching import command, run, suite
from tests.mpi.jobs import events, train
from tests.unit.outer_checkpoints import kept, optimizer_steps

DIGITS = ("--config", "hvd_train/demo/digits.toml", "--patience", "0", "--threads", "1", "--period", "3")
GRADIENTS = ("--sync", "gradients", "--optim.name", "AdamW", "--lr", "0.001", "--optim.clip-norm", "1")
KEEP = ("--checkpoint.keep", "50")


def test_four_ranks_are_one_process_with_the_joint_batch() -> None:
    """And so are the rounds of a warm-up, before local SGD."""
    program = [*suite("tests/mpi/suite_gradients.py"), "tests/mpi/suite_warm_up.py"]
    job = run(command("mpirun", 4, program), deadline_s=300, env={"OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.output
    assert re.findall(r"(\d+) passed", job.output) == ["26"] * 4, job.output


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Its moments are dealt anew, in shared memory too, and the error goes on falling."""
    train("mpirun", 2, tmp_path, "--name", "r", *DIGITS, *GRADIENTS, *KEEP, "--max-rounds", "40")
    train("mpirun", 3, tmp_path, "--resume", str(tmp_path / "r"), "--max-rounds", "80")
    folder = tmp_path / "r" / "checkpoints"
    before, after = (folder / f"round-{n}" for n in (40, 80))
    assert (optimizer_steps(before), optimizer_steps(after)) == ({120.0}, {240.0})
    lengths = [{key: len(value) for key, value in kept(of, "sliced").items()} for of in (before, after)]
    assert lengths[0] == lengths[1]
    assert {key.partition("/")[0] for key in lengths[0]} == {"exp_avg", "exp_avg_sq"}
    first, last = (events(tmp_path / "r", "evaluation")[n]["error"] for n in (0, -1))
    assert last < first
