"""CSV files, read by pyarrow."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hvd_train.data.files import require_regular
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.sources.base import BLOCK_BYTES, Block, rows_of_block
from hvd_train.data.sources.columns import Converter, choose, text_refusal
from hvd_train.data.sources.csv_rows import whole_rows
from hvd_train.data.sources.tables import LineTooLong, Tables, explained, load_pyarrow, missing_column
from hvd_train.errors import DataError


@final
class CsvSource(Tables):
    """CSV files with a line of column names, plain or .gz; .tsv files have tabs. Every file is read once to
    find the types of its columns: int64, else float64.

    Args:
        names: the columns of each field.
        group: the column that says to which group a row belongs; empty for none.
        classes: texts of the column of targets that are classes.
        progress: of the first pass.
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
        self._arrow = load_pyarrow("CSV")
        self._rows = {}
        self._dtypes: dict[str, str] = {}
        self._long: set[str] = set()
        self._progress = progress
        self._num_bytes = 0
        self._chosen = choose(self._header(paths[0]), names, group, classes, paths[0])
        for path in paths:
            with explained(path, "CSV"):
                require_regular(path, "a CSV file")
                self._num_bytes += os.path.getsize(path)
        for path in paths:
            self._survey(path)
        for path in paths:
            converter = Converter(self._chosen, self._dtypes, path)
            for columns in self._batches(path, self._chosen.all):
                fields = converter.fields(columns)
                if not hasattr(self, "_fields"):
                    self._fields = fields
                self._require_alike(path, fields)
                break

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        wanted = self._chosen.all if not names else [c for n in names for c in self._chosen.columns[n]]
        rows = rows_of_block(self._fields)
        for path in self._paths:
            converter = Converter(self._chosen, self._dtypes, path)
            row = 0
            for columns in self._batches(path, wanted):
                length = len(next(iter(columns.values())))
                for first in range(max(0, start - row), length, rows):
                    piece = {name: column.slice(first, rows) for name, column in columns.items()}
                    yield converter.block(piece, row + first)
                row += length
            start = max(0, start - row)

    def _header(self, path: str) -> list[str]:
        try:
            with explained(path, "CSV"):
                require_regular(path, "a CSV file")
                return list(self._stream(path, None, {}).schema.names)
        except LineTooLong:
            with explained(path, "CSV"):
                first = next(whole_rows(self._file(path), self._delimiter(path), path))
                return self._names(path, first)

    def _stream(self, path: str, columns: list[str] | None, types: Mapping[str, Any]) -> Any:
        from pyarrow import csv

        options = csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
        return csv.open_csv(self._file(path), options, self._parsed(path), _converted(columns, types))

    def _names(self, path: str, row: memoryview) -> list[str]:
        from pyarrow import csv

        return list(
            csv.read_csv(self._arrow.BufferReader(row), parse_options=self._parsed(path)).schema.names
        )

    def _parsed(self, path: str) -> Any:
        from pyarrow import csv

        return csv.ParseOptions(delimiter=self._delimiter(path).decode(), newlines_in_values=True)

    def _file(self, path: str) -> Any:
        self._raw = self._arrow.OSFile(path)
        return self._arrow.CompressedInputStream(self._raw, "gzip") if path.endswith(".gz") else self._raw

    def _delimiter(self, path: str) -> bytes:
        return b"\t" if ".tsv" in Path(path).suffixes else b","

    def _read(self, path: str, columns: list[str], types: Mapping[str, Any]) -> Iterator[Any]:
        """The rows of some columns, as record batches or tables."""
        from pyarrow import csv

        if path not in self._long:
            yield from self._stream(path, columns, types)
            return
        names: list[str] = []
        for rows in whole_rows(self._file(path), self._delimiter(path), path):
            if names:
                options = csv.ReadOptions(use_threads=False, block_size=len(rows) + 1, column_names=names)
                file = self._arrow.BufferReader(rows)
                yield csv.read_csv(file, options, self._parsed(path), _converted(columns, types))
                del file
            names = names or self._names(path, rows)
            del rows  # a long one need not be there while the next is read

    def _batches(self, path: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The columns of the rows, some at a time."""
        kinds = {"int64": self._arrow.int64(), "float64": self._arrow.float64()}
        types = {name: kinds.get(self._dtypes.get(name, ""), self._arrow.string()) for name in columns}
        with explained(path, "CSV"):
            for batch in self._read(path, columns, types):
                if batch.num_rows:
                    yield dict(zip(batch.schema.names, map(_whole, batch.columns), strict=True))

    def _survey(self, path: str) -> None:
        """Finds the number of rows, and the types of the columns."""
        there = self._header(path)
        for name in self._chosen.all:
            if name not in there:
                raise DataError(missing_column(path, name, there))
        try:
            with explained(path, "CSV"):
                self._rows[path] = self._count(path)
        except LineTooLong:
            self._long.add(path)
            with explained(path, "CSV"):
                self._rows[path] = self._count(path)

    def _count(self, path: str) -> int:
        """Rows of a file. Finds the types of the columns."""
        rows = 0
        texts = {name: self._arrow.string() for name in self._chosen.all}
        for batch in self._read(path, self._chosen.all, texts):
            for name, column in zip(batch.schema.names, map(_whole, batch.columns), strict=True):
                if not self._chosen.is_text(name):
                    known = self._dtypes.get(name, "int64")
                    self._dtypes[name] = self._kind(column, known, name, path, rows)
            rows += batch.num_rows
            done = sum(map(os.path.getsize, self._rows)) + self._raw.tell()
            self._progress(Step("read to count rows", done, self._num_bytes, "bytes"))
        return rows

    def _kind(self, column: Any, known: str, name: str, path: str, row: int) -> str:
        """int64 or float64, whichever holds all values so far."""
        for kind in ("int64", "float64") if known == "int64" else ("float64",):
            try:
                column.cast(kind)
            except self._arrow.ArrowInvalid:
                continue
            return kind
        for at, text in enumerate(column.to_pylist()):
            try:
                float(text or 0)
            except ValueError:
                raise DataError(text_refusal(path, row + at, name, text)) from None
        raise DataError(f"{path}: column `{name}` has numbers that are not decimal. Write them as 1.5 or 15.")


def _whole(column: Any) -> Any:
    """A column of a record batch as it is, or of a table in one piece."""
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def _converted(columns: list[str] | None, types: Mapping[str, Any]) -> Any:
    """Options of pyarrow: the columns that are wanted, all if None, and their types."""
    from pyarrow import csv

    return csv.ConvertOptions(include_columns=columns, column_types=types, strings_can_be_null=True)
