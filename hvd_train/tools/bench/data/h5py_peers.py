"""The usual ways to train from HDF5 files by h5py: a batch at a time, or torch's DataLoader."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hvd_train.data.sources.base import INPUTS, TARGETS
from hvd_train.tools.bench.data.contestants import SEED, Batches, Contestant


def batch_by_batch(path: Path, setting: str) -> Contestant:
    """The rows of each batch by one selection of h5py, in ascending order as it wants them."""

    def batches(size: int) -> Batches:
        rng = np.random.default_rng(SEED)
        with h5py.File(path) as file:
            inputs, targets = file[INPUTS], file[TARGETS]
            while True:
                order = rng.permutation(len(inputs))
                for start in range(0, len(order), size):
                    rows = np.sort(order[start : start + size])
                    yield inputs[rows], targets[rows]

    return Contestant(name="h5py", setting=f"a batch at a time, {setting}", files=[path], batches=batches)


def data_loader(path: Path, setting: str, workers: int) -> Contestant:
    """torch's DataLoader over a Dataset that reads one row by h5py, with torch's own collation."""

    def batches(size: int) -> Batches:
        loader = DataLoader(
            _RowByRow(path),
            batch_size=size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(SEED),
        )
        while True:
            yield from loader

    return Contestant(
        name="DataLoader",
        setting=f"{workers} worker{'s' * (workers != 1)}, {setting}",
        files=[path],
        batches=batches,
    )


@final
class _RowByRow(Dataset[tuple[Tensor, Any]]):
    """One row a call. The file is opened in the process that reads it, as HDF5 requires."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None
        with h5py.File(path) as file:
            self._rows = len(file[INPUTS])

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        if self._file is None:
            self._file = h5py.File(self._path)
        return torch.from_numpy(np.asarray(self._file[INPUTS][row])), self._file[TARGETS][row]
