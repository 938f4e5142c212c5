"""CSV files, read by pyarrow."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

from hvd_train.data.files import require_regular
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.sources.base import BLOCK_BYTES, Block, rows_of_block
from hvd_train.data.sources.columns import Converter, choose, text_refusal
from hvd_train.data.sources.tables import LineTooLong, Tables, explained, load_pyarrow
from hvd_train.errors import DataError

_MOST_LINE_BYTES = 256 << 20


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
        self._block_bytes = BLOCK_BYTES
        self._progress = progress
        self._num_bytes = 0
        self._chosen = choose(self._header(paths[0]), names, group, classes, paths[0])
        for path in paths:
            with explained(path, "CSV"):
                require_regular(path, "a CSV file")
                self._num_bytes += os.path.getsize(path)
        for path in paths:
            self._rows[path] = self._in_blocks(path, partial(self._count, path))
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
        with explained(path, "CSV"):
            require_regular(path, "a CSV file")
        return list(self._in_blocks(path, lambda: self._open(path, None, {}).schema.names))

    def _open(self, path: str, columns: list[str] | None, types: Mapping[str, Any]) -> Any:
        from pyarrow import csv

        self._raw = self._arrow.OSFile(path)
        file = self._raw
        if path.endswith(".gz"):
            file = self._arrow.CompressedInputStream(file, "gzip")
        return csv.open_csv(
            file,
            csv.ReadOptions(use_threads=False, block_size=self._block_bytes),
            csv.ParseOptions(
                delimiter="\t" if ".tsv" in Path(path).suffixes else ",", newlines_in_values=True
            ),
            csv.ConvertOptions(include_columns=columns, column_types=types, strings_can_be_null=True),
        )

    def _batches(self, path: str, columns: list[str]) -> Iterator[dict[str, Any]]:
        """The columns of the rows, some at a time."""
        kinds = {"int64": self._arrow.int64(), "float64": self._arrow.float64()}
        types = {name: kinds.get(self._dtypes.get(name, ""), self._arrow.string()) for name in columns}
        with explained(path, "CSV"):
            for batch in self._open(path, columns, types):
                if batch.num_rows:
                    yield dict(zip(batch.schema.names, batch.columns, strict=True))

    def _in_blocks(self, path: str, read: Callable[[], Any]) -> Any:
        """What `read` returns, with blocks in which each line fits."""
        while True:
            try:
                with explained(path, "CSV"):
                    return read()
            except LineTooLong:
                self._block_bytes *= 2
                if self._block_bytes > _MOST_LINE_BYTES:
                    raise DataError(
                        f"{path}: a line is longer than {_MOST_LINE_BYTES >> 20} MiB, or a quotation mark is "
                        "missing. Expected shorter lines."
                    ) from None

    def _count(self, path: str) -> int:
        """Rows of a file. Finds the types of the columns."""
        rows = 0
        texts = {name: self._arrow.string() for name in self._chosen.all}
        for batch in self._open(path, self._chosen.all, texts):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
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
