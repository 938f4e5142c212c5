"""Files with chunks of any shape for the tests, whose every value is another one; and reading files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.deal import Span
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.data.readers.base import Reader
from hvd_train.data.rows import Rows

NAMES = ("inputs", "targets")
MIB = 1 << 20


def inputs_of(rows: int, *shape: int) -> npt.NDArray[np.float32]:
    """Every value is another one: its number, up to 2**24."""
    return (np.arange(rows * int(np.prod(shape))) % (1 << 24)).astype(np.float32).reshape(rows, *shape)


def write(
    path: Path, inputs: npt.NDArray[Any], chunks: Any = None, targets: Any = None, **options: Any
) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=inputs, chunks=chunks, **options)
        file.create_dataset("targets", data=np.arange(len(inputs)), **(targets or {}))
    return path


def rows_of(path: Path, *spans: tuple[int, int]) -> Rows:
    info = read_info(path, plain(NAMES))
    return Rows([Span(str(path), *span) for span in spans or [(0, info.num_samples)]], info.fields)


def drain(reader: Reader, inputs: npt.NDArray[Any], size: int = 64) -> list[int]:
    """The rows of an epoch, each compared with what was written."""
    numbers: list[int] = []
    while (batch := reader.next_batch(size)) is not None:
        np.testing.assert_array_equal(batch["inputs"], inputs[batch["targets"]])
        numbers += batch["targets"].tolist()
    return numbers


def catalog_of(path: Path, **data: Any) -> Catalog:
    """Of a file, by keys of `data`."""
    return open_catalog(DataConfig(path=str(path), **data))


def all_rows(path: Path, **data: Any) -> dict[str, Any]:
    """The fields of all rows of a file."""
    catalog = catalog_of(path, **data)
    rows = Rows(catalog.train, catalog.sample.fields)
    try:
        return rows.read(0, len(rows))
    finally:
        rows.close()
