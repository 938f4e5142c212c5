"""The project that `hvd_train init` writes: every command of its README.md trains, as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_train.tools.init import main
from tests.launching import run, tool
from tests.mpi.jobs import SHORT, events

pytestmark = pytest.mark.mpi

RANKS = {
    "python -m hvd_train --config": 1,
    "python -m hvd_train launch -np 2": 2,
    "python -m hvd_train launch --hostfile": 4,
    "mpirun -np 2": 2,
}
"""By the beginning of a command that starts ranks without Slurm: how many."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "project"
    assert main([str(folder)]) == 0
    return folder


def commands(folder: Path) -> list[str]:
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("    ")]
    return [line.partition("#")[0].strip() for line in lines]


def test_every_way_to_start_is_tried(project: Path) -> None:
    starts = [line for line in commands(project) if not line.startswith("sbatch ")]
    assert len(starts) == len(RANKS)
    assert all(any(line.startswith(begin) for begin in RANKS) for line in starts)


@pytest.mark.parametrize("begin", RANKS)
def test_it_trains_as_it_is(begin: str, project: Path) -> None:
    (line,) = (line for line in commands(project) if line.startswith(begin))
    words = line.split()
    name = f"r{len(list(project.glob('runs/*')))}"
    job = run(
        [tool(words[0]), *words[1:], "--name", name, "--threads", "1", *SHORT], deadline_s=120, cwd=project
    )
    assert job.returncode == 0, job.output
    (header,) = events(project / "runs" / name, "header")
    assert header["world_size"] == RANKS[begin]
    assert header["task"] == "task.py:MyTask"
    (stop,) = events(project / "runs" / name, "stop")
    assert stop["best"] < 0.6, "one of ten classes by chance would be 0.9"
