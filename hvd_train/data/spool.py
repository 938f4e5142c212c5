"""Rows kept on disk for a while, in one file, in memory that does not grow with their number."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import row_bytes
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import Block, rows_of_block
from hvd_train.data.sources.streamed import read_exactly

_KEY = "\0key"
"""No field has such a name."""

_SINGLY_BYTES = 1 << 20
"""From this size on rows are read one by one: several of them might not fit into memory."""


@final
class Spool:
    """Rows of `fields` in a file at `path`, which is made by the first `append`. Each row may have a key.

    Methods raise OSError.
    """

    def __init__(self, path: Path, fields: Mapping[str, FieldSpec]) -> None:
        self._path = path
        self._fields = fields
        columns = [(name, field.dtype, field.shape) for name, field in fields.items()]
        self._record = np.dtype([*columns, (_KEY, np.uint64)])
        self._pending: list[Array] = []
        self.num_rows = 0
        self.pending_bytes = 0
        """Of rows that are in memory until `flush`."""

    def append(self, block: Block, keys: npt.NDArray[np.uint64] | None = None) -> None:
        """Takes rows, [rows, ...] of every field."""
        records = np.empty(len(next(iter(block.values()))), self._record)
        records[_KEY] = 0 if keys is None else keys
        for name in self._fields:
            records[name] = block[name]
        self._pending.append(records)
        self.num_rows += len(records)
        self.pending_bytes += records.nbytes

    def flush(self) -> None:
        """Writes the rows that are in memory."""
        if self._pending:
            with open(self._path, "ab", buffering=0) as file:
                for records in self._pending:
                    content = records.view(np.uint8).reshape(-1).data
                    while content:
                        content = content[file.write(content) :]
            self._pending, self.pending_bytes = [], 0

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The rows from number `start` on, in the order in which they came."""
        self.flush()
        rows = rows_of_block(self._fields)
        for first in range(start, self.num_rows, rows):
            yield self._columns(self._read(first, min(rows, self.num_rows - first)))

    def sorted_blocks(self) -> Iterator[Block]:
        """The rows in the order of their keys. All are in memory at once unless a row is large."""
        self.flush()
        if not self.num_rows:
            return
        if self._record.itemsize >= _SINGLY_BYTES:
            keys = [self._key(row) for row in range(self.num_rows)]
            for row in np.argsort(keys).tolist():
                yield self._columns(self._read(row, 1))
            return
        records = self._read(0, self.num_rows)
        order = np.argsort(records[_KEY])
        rows = rows_of_block(self._fields)
        for first in range(0, self.num_rows, rows):
            yield self._columns(records[order[first : first + rows]])

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self._pending, self.num_rows, self.pending_bytes = [], 0, 0
        self._path.unlink(missing_ok=True)

    def _read(self, first: int, num_rows: int) -> Array:
        records = np.empty(num_rows, self._record)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(first * self._record.itemsize)
            read_exactly(file, records.view(np.uint8).reshape(-1).data)
        return records

    def _key(self, row: int) -> int:
        with open(self._path, "rb", buffering=0) as file:
            file.seek((row + 1) * self._record.itemsize - 8)
            return int.from_bytes(file.read(8), sys.byteorder)

    def _columns(self, records: Array) -> dict[str, Array]:
        return {name: np.ascontiguousarray(records[name]) for name in self._fields}


def bytes_of_row(fields: Mapping[str, FieldSpec]) -> int:
    """Bytes of one row of all fields."""
    return sum(map(row_bytes, fields.values()))
