"""Parquet files, read by pyarrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, final

from hvd_train.data.files import require_regular
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.sources.base import Block, rows_of_block
from hvd_train.data.sources.columns import Chosen, Converter, choose
from hvd_train.data.sources.tables import Tables, explained, load_pyarrow, missing_column
from hvd_train.errors import DataError


@final
class ParquetSource(Tables):
    """Parquet files. A column is a number a row, or a list of as many numbers in every row.

    Arguments are those of `CsvSource`. One row group of the columns that are used is in memory.
    """

    def __init__(
        self,
        paths: Sequence[str],
        names: Mapping[str, str],
        group: str,
        classes: tuple[str, ...],
        progress: Progress = unseen,
    ) -> None:
        super().__init__(paths, classes)
        self._arrow = load_pyarrow("Parquet")
        self._rows = {}
        self._converters: dict[str, Converter] = {}
        for number, path in enumerate(paths):
            progress(Step("opened", number, len(paths), "files"))
            with explained(path, "Parquet"):
                require_regular(path, "a Parquet file")
                file = self._open(path)
                schema = file.schema_arrow
            if not self._rows:
                self._chosen = choose(schema.names, names, group, classes, path)
            self._rows[path] = file.metadata.num_rows
            self._converters[path] = Converter(self._chosen, _dtypes(schema, self._chosen, path), path)
            for columns in self._batches(path, self._chosen.all, 1):
                fields = self._converters[path].fields(columns)
                if not hasattr(self, "_fields"):
                    self._fields = fields
                self._require_alike(path, fields)
                break
        if not hasattr(self, "_fields"):
            raise DataError(f"{self.name}: 0 rows. Expected at least 1.")

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        wanted = self._chosen.all if not names else [c for n in names for c in self._chosen.columns[n]]
        rows = rows_of_block(self._fields)
        for path, count in self._rows.items():
            if start >= count:
                start -= count
                continue
            row = 0
            for columns in self._batches(path, wanted, rows):
                length = len(next(iter(columns.values())))
                skipped = min(length, max(0, start - row))
                if skipped < length:
                    piece = {name: column.slice(skipped) for name, column in columns.items()}
                    yield self._converters[path].block(piece, row + skipped)
                row += length
            start = 0

    def _open(self, path: str) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)

    def _batches(self, path: str, columns: list[str], rows: int) -> Iterator[dict[str, Any]]:
        with explained(path, "Parquet"):
            file = self._open(path)
            for batch in file.iter_batches(batch_size=rows, columns=columns, use_threads=False):
                arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
                for name in columns:
                    if self._chosen.is_text(name):
                        arrays[name] = arrays[name].cast(self._arrow.string())
                yield arrays
            file.close()


def _dtypes(schema: Any, chosen: Chosen, path: str) -> dict[str, str]:
    """The numpy types of the columns that are read as numbers. Raises `DataError` for others."""
    dtypes = {}
    for name in chosen.all:
        if name not in schema.names:
            raise DataError(missing_column(path, name, schema.names))
        if chosen.is_text(name):
            continue
        kind = schema.field(name).type
        inner = getattr(kind, "value_type", kind)
        try:
            dtype = inner.to_pandas_dtype()
        except NotImplementedError:
            dtype = object
        names = getattr(dtype, "__name__", "object").rstrip("_")
        if names not in _NUMBERS:
            raise DataError(
                f"{path}: row 0: column `{name}` is of type {kind}. Expected a number. If these are classes, "
                "name the column in --targets and list its texts in --classes; else name other columns in "
                "--inputs."
            )
        dtypes[name] = names
    return dtypes


_NUMBERS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64"),
}
