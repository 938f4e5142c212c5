"""Training on a Python dataset by several ranks."""

from __future__ import annotations

from pathlib import Path

from tests.mpi.jobs import events, train
from tests.unit.data.python_datasets import write_module

TEXT = """
import os

Few = type("Few", (Streamed,), {"rows": 12})


class Unlike(Plain):
    def __len__(self):
        return 60 + int(os.environ["OMPI_COMM_WORLD_RANK"] if "OMPI_COMM_WORLD_RANK" in os.environ else
                        os.environ["PMI_RANK"])
"""


def test_every_row_once_an_epoch(tmp_path: Path) -> None:
    """2 ranks stop in the middle of an epoch, 3 go on."""
    rows, runs, path = tmp_path / "rows", tmp_path / "runs", write_module(tmp_path, TEXT)
    rows.mkdir()
    options = [
        "--data",
        f"{path}:Plain",
        "--data.validation",
        f"{path}:Few",
        "--name",
        "r",
        "--batch-size",
        "2",
    ]
    options += [
        "--task",
        "tests/mpi/recording.py:Recording",
        "--period",
        "1",
        "--patience",
        "0",
        "--threads",
        "1",
    ]
    env = {"ROWS_OF_RANKS": str(rows)}
    first = train("mpirun", 2, runs, *options, "--stop.max-rounds", "4", deadline_s=180, env=env)
    line = f"{path}:Plain: each rank reads its part of the 60 samples once to count the classes"
    assert first.stderr.count(line) == 1, first.stderr
    (header,) = events(runs / "r", "header")
    assert (header["samples_per_rank"], header["validation_samples"]) == ([30, 30], 12)
    used = sorted(int(n) for file in rows.iterdir() for n in file.read_text().split())
    assert len(used) == len(set(used)) == 16
    stop = ["--stop.max-rounds", "400", "--stop.max-epochs", "2"]
    job = train("mpirun", 3, runs, *options, "--resume", "auto", *stop, deadline_s=180, env=env)
    assert "goes on with the 44 rows that it has left." in job.stderr, job.stderr
    used = sorted(int(n) for file in rows.iterdir() for n in file.read_text().split())
    assert used == sorted([*range(60)] * 2)


def test_ranks_whose_datasets_differ(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path, TEXT)}:Unlike"
    job = train(
        "mpirun", 2, tmp_path / "runs", "--data", name, "--threads", "1", deadline_s=180, succeeds=False
    )
    assert job.returncode == 2, job.output
    message = (
        "the ranks have different data: samples of mine.py:Unlike is 60 on rank 0 but 61 on rank 1. Every "
        "rank must see the same files."
    )
    assert job.output.count(message) == 1, job.output
