"""Shards to predict on, and what a job of one rank makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hvd_train.after.predict.options import Options
from hvd_train.after.predict.run import predict
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.tasks.base import Task
from tests.unit.data.shards import inputs_of

ROWS = (5, 1, 64)
"""Of the shards that are predicted on; ids and inputs run on from one to the next."""


def write_shards(folder: Path, ids: Callable[[int], Any] = lambda row: 10**12 - row) -> str:
    """Shards without targets, whose rows have an id; the pattern that names them in order."""
    first = 0
    for number, rows in enumerate(ROWS):
        with h5py.File(folder / f"part{number}.h5", "w") as file:
            file["inputs"] = inputs_of(first, rows)
            file["id"] = np.array([ids(row) for row in range(first, first + rows)])
            file["meta/id"] = file["id"]
        first += rows
    return str(folder / "part*.h5")


def options(trained: Path, folder: Path, out: str = "p.h5", **others: Any) -> Options:
    data = others.pop("data", None) or write_shards(folder)
    plain = {"batch_size": 4, "part_rows": 7, "threads": torch.get_num_threads(), **others}
    return Options(run=str(trained), data=data, out=str(folder / out), **plain)


def datasets(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        assert all(file[name].chunks is None for name in file)
        return {name: file[name][:] for name in file}


def solo(given: Options, task: Task | None = None) -> dict[str, np.ndarray]:
    predict(given, SoloCommunicator(), task)
    return datasets(Path(given.out))
