"""The commands of README.md for Slurm, on a real one. tests/test_readme.py runs the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.launching import ROOT
from tests.test_readme import BLOCKS, BY_SLURM, commands

pytestmark = pytest.mark.cluster

SHELL = [command for block in BLOCKS if block.language == "sh" for command in commands(block)]
COMMANDS = [command for command in SHELL if command.startswith(BY_SLURM)]

SHORTER = ("--threads", "1", "--max-rounds", "4")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("examples", "launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_it_trains(command: str, slurm: Slurm, checkout: Path) -> None:
    words, env = [*shlex.split(command), *SHORTER], {"VENV": sys.prefix}
    if words[0] == "sbatch":
        job = slurm.sbatch(*words[1:], cwd=checkout, env=env)
        log = checkout / f"hvd_train-{job}.log"
        slurm.wait(job, "COMPLETED", deadline_s=90, log=log)
        said = log.read_text()
    else:
        done = slurm.run("salloc", "--ntasks=2", *words, cwd=checkout, env=env)
        assert done.returncode == 0, done.output
        said = done.stdout
    assert "stopped   the limit of rounds is reached (round 4)" in said


def test_the_commands_exist() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"sbatch", "launch/srun.sh"}
