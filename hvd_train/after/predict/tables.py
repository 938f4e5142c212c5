"""The files that predictions are written to: HDF5, CSV and Parquet. Each takes the rows in order."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np

from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.hdf5.write import RowWriter
from hvd_train.errors import EnvironmentMismatch, OutputError

_MOST_COLUMNS = 10_000
_CELLS = 1 << 16
"""Values that are text at the same time."""

Attributes = Mapping[str, str | int]


class Table(ABC):
    """A file that is being written. Every method may raise OSError."""

    @abstractmethod
    def append(self, rows: Mapping[str, Array]) -> None:
        """Writes the next rows of all datasets."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is left."""


@final
class _Hdf5(Table):
    """Contiguous datasets, one for each name."""

    def __init__(
        self, path: Path, fields: Mapping[str, FieldSpec], num_rows: int, attributes: Attributes
    ) -> None:
        self._writer = RowWriter(path, fields, num_rows, attributes)

    def append(self, rows: Mapping[str, Array]) -> None:
        self._writer.append(rows)

    def close(self) -> None:
        self._writer.close()


@final
class _Csv(Table):
    """A line of column names, then one for each row. Numbers have the digits that tell them from all others
    of their type."""

    def __init__(self, path: Path, fields: Mapping[str, FieldSpec]) -> None:
        self._file = open(path, "x", encoding="utf-8", newline="")  # noqa: SIM115, closed below
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(_columns(fields))
        self._rows = max(1, _CELLS // len(_columns(fields)))

    def append(self, rows: Mapping[str, Array]) -> None:
        count = len(next(iter(rows.values())))
        for start in range(0, count, self._rows):
            block = {name: array[start : start + self._rows] for name, array in rows.items()}
            self._writer.writerows(zip(*map(_texts, _split(block)), strict=True))

    def close(self) -> None:
        self._file.close()


@final
class _Parquet(Table):
    """A row group for each part; the attributes are the schema's metadata."""

    def __init__(self, path: Path, fields: Mapping[str, FieldSpec], attributes: Attributes) -> None:
        import pyarrow
        from pyarrow import parquet

        self._pyarrow: Any = pyarrow
        types = [
            (column, pyarrow.string() if dtype.kind == "S" else pyarrow.from_numpy_dtype(dtype))
            for column, dtype in _columns(fields).items()
        ]
        metadata = {key: str(value) for key, value in attributes.items()}
        self._schema = pyarrow.schema(types, metadata)
        self._writer = parquet.ParquetWriter(str(path), self._schema)

    def append(self, rows: Mapping[str, Array]) -> None:
        arrays = [
            self._pyarrow.array(_texts(values) if values.dtype.kind == "S" else values)
            for values in _split(rows)
        ]
        self._writer.write_table(self._pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def open_table(
    path: Path, suffix: str, fields: Mapping[str, FieldSpec], num_rows: int, attributes: Attributes
) -> Table:
    """A new file at `path` of the kind that `suffix` says. Raises OSError."""
    if suffix == ".csv":
        return _Csv(path, fields)
    if suffix == ".parquet":
        return _Parquet(path, fields, attributes)
    return _Hdf5(path, fields, num_rows, attributes)


def require_fit(suffix: str, fields: Mapping[str, FieldSpec]) -> None:
    """Raises `OutputError` for a row that such a file cannot hold, and `EnvironmentMismatch` where what
    writes it is not installed."""
    if suffix not in (".csv", ".parquet"):
        return
    for name, field in fields.items():
        if len(field.shape) > 1:
            raise OutputError(
                f"--out: `{name}` has the shape {list(field.shape)} a row; expected at most one axis in a "
                f"{suffix} file, whose columns are numbers. Write an .h5 file."
            )
    width = sum(_width(field) for field in fields.values())
    if not 1 <= width <= _MOST_COLUMNS:
        raise OutputError(
            f"--out: a row would have {width:,} columns; expected 1 to {_MOST_COLUMNS:,} in a {suffix} file. "
            "Write an .h5 file."
        )
    if len(_columns(fields)) != width:
        raise OutputError(
            f"--out: two columns of a {suffix} file would have the same name, such as `a_0`, of `a` and of "
            "`a_0`; expected different ones. Rename a prediction, or write an .h5 file."
        )
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise EnvironmentMismatch(
            "--out: a .parquet file is written by pyarrow, which is not installed. Expected it for this "
            "suffix: `pip install 'hvd_train[parquet]'`, or write an .h5 or .csv file."
        )


def _width(field: FieldSpec) -> int:
    return field.shape[0] if field.shape else 1


def _columns(fields: Mapping[str, FieldSpec]) -> dict[str, np.dtype[Any]]:
    """The columns with their types: `name`, or `name_0` and so on of a vector."""
    return {
        column: np.dtype(field.dtype)
        for name, field in fields.items()
        for column in ([f"{name}_{i}" for i in range(field.shape[0])] if field.shape else [name])
    }


def _split(rows: Mapping[str, Array]) -> Iterator[Array]:
    """The values of each column, in the order of `_columns`."""
    for array in rows.values():
        yield from array.T if array.ndim == 2 else [array]


def _texts(values: Array) -> list[Any]:
    """What is written of a column: text, or integers and booleans as they are."""
    if values.dtype.kind == "S":
        return [value.decode("utf-8", "backslashreplace") for value in values.tolist()]
    return list((values.astype(str) if values.dtype.kind == "f" else values).tolist())
