"""HDF5 files for the tests: rows that differ by index, and foreign files with nothing but two datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.data.hdf5.file import ShardFile


def inputs_of(first: int, rows: int, width: int = 3) -> npt.NDArray[np.float32]:
    """float32 [rows, width]: row i is i, i + 0.25, i + 0.5, ... for global row numbers from `first` on."""
    numbers = np.arange(first, first + rows, dtype=np.float32)
    return numbers[:, None] + np.arange(width, dtype=np.float32) / 4


def write_foreign(path: Path, rows: int, first: int = 0, **options: Any) -> Path:
    """A file as another program would write it: `inputs` and `targets` = global row number % 7."""
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=inputs_of(first, rows), **options)
        file.create_dataset("targets", data=np.arange(first, first + rows) % 7)
    return path


def row_numbers(batch: dict[str, npt.NDArray[Any]]) -> list[int]:
    """The global row numbers in a batch; checks that inputs and targets belong to the same rows."""
    numbers = batch["inputs"][:, 0].astype(int)
    np.testing.assert_array_equal(batch["inputs"], numbers[:, None] + np.arange(3) / 4)
    np.testing.assert_array_equal(batch["targets"], numbers % 7)
    return list(map(int, numbers))


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from now on."""
    names: list[str] = []
    init = ShardFile.__init__

    def counting(self: ShardFile, path: str, *args: object, **options: object) -> None:
        names.append(Path(path).name)
        init(self, path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardFile, "__init__", counting)
    return names
