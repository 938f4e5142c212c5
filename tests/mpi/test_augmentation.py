"""Worker processes of two ranks under MPI."""

from __future__ import annotations

from pathlib import Path

from tests.launching import ROOT
from tests.mpi.jobs import events, model_bytes, train

TASK = f"{ROOT / 'tests' / 'unit' / 'algorithm' / 'augmenting.py'}:Flat"


def test_workers_of_several_ranks_give_the_same_bits(tmp_path: Path) -> None:
    models = []
    for workers in ("0", "1"):
        options = ["--task", TASK, "--data.workers", workers, "--max-rounds", "6", "--patience", "0"]
        train("mpirun", 2, tmp_path, *options, "--data", "digits", "--name", f"w{workers}", deadline_s=120)
        models.append(model_bytes(tmp_path / f"w{workers}"))
        (header,) = events(tmp_path / f"w{workers}", "header")
        assert header["world_size"] == 2
    assert models[0] == models[1]
