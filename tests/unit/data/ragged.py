"""Rows of different lengths for the tests, in both layouts, and the same rows padded by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.format import Array
from hvd_train.data.rows import Rows

PACKED = "packed(values, offsets)"


def rows_of_lengths(lengths: Sequence[int], dtype: Any = "i4", low: int = 1) -> list[Array]:
    """Row i has `lengths[i]` values from `low` up to 100, different ones for each row."""
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(low, 100, length).astype(dtype) for length in lengths]


def padded(rows: Sequence[Array], length: int) -> tuple[Array, Array]:
    """The rows cut or padded with zeros to `length`, and where they have values."""
    values: Array = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    marks = np.zeros((len(rows), length), bool)
    for row, (target, mark) in zip(rows, zip(values, marks, strict=True), strict=True):
        target[: len(row)], mark[: len(row)] = row[:length], True
    return values, marks


def write_vlen(file: h5py.File, name: str, rows: Sequence[Array], **options: Any) -> h5py.Dataset:
    """A dataset of variable-length type."""
    dataset = file.create_dataset(name, (len(rows),), h5py.vlen_dtype(rows[0].dtype), **options)
    for i, row in enumerate(rows):
        dataset[i] = row
    return dataset


def write_packed(file: h5py.File, rows: Sequence[Array], prefix: str = "", **options: Any) -> None:
    """`values`, `offsets`, `starts` and `lengths`."""
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    file.create_dataset(f"{prefix}values", data=np.concatenate([*rows]), **options)
    file.create_dataset(f"{prefix}offsets", data=offsets, **options)
    file[f"{prefix}starts"], file[f"{prefix}lengths"] = offsets[:-1], lengths


def catalog_of(path: Path, **more: Any) -> Catalog:
    """Of a file, padded to 8 unless `more` says otherwise."""
    return open_catalog(DataConfig(path=str(path), **{"max_length": 8, **more}))


def read(catalog: Catalog, start: int = 0, stop: int | None = None) -> dict[str, Array]:
    """Rows of all fields."""
    rows = Rows(catalog.train, catalog.sample.fields)
    try:
        return rows.read(start, len(rows) if stop is None else stop)
    finally:
        rows.close()
