"""Comparing rows with the checksums that their file carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import checksum
from hvd_train.data.format import Array
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.errors import DataError
from hvd_train.liveness import mark


@final
class Verifier:
    """Reads rows of one dataset, and compares each block of them with its checksum when it is first read.

    One for each dataset of each file; it outlives the `ShardFile`, which may be closed and opened again.
    A dataset without checksums is read as it is.
    """

    def __init__(self, file: ShardFile, name: str) -> None:
        self._name = name
        self._num_rows = file.info.num_samples
        self._sums = file.checksums(name)
        self._block_rows = file.info.checksum_rows or 1
        self._verified: npt.NDArray[np.bool_] = np.zeros(0 if self._sums is None else len(self._sums), bool)

    @property
    def compares(self) -> bool:
        """Whether the dataset has checksums."""
        return self._sums is not None

    def read_into(self, file: ShardFile, ranges: Sequence[tuple[int, int]], out: Array) -> None:
        """As `ShardFile.read_into`. Raises `DataError` with the rows of a block that is not what was written.

        Of a block that is not verified yet all rows are read, though only some are asked for.
        """
        if self._sums is None or all(self._verified[self._blocks(*rows)].all() for rows in ranges):
            file.read_into(self._name, ranges, out)
            return
        if not file.is_whole(self._name):
            for start, stop in ranges:
                self._verify_stored(file, start, stop)
            file.read_into(self._name, ranges, out)
            return
        at = 0
        for start, stop in ranges:
            self._read_range(file, start, stop, out[at : at + stop - start])
            at += stop - start

    def verify(self, path: str, rows: npt.NDArray[np.int64], stored: Array) -> None:
        """Verifies the blocks of the shard `path` that the rows are in; `stored`: all rows of the dataset.
        Raises `DataError` as `read_into` does."""
        if self._sums is None:
            return
        blocks = rows // self._block_rows
        blocks = blocks[~self._verified[blocks]]
        for block in np.unique(blocks).tolist() if len(blocks) else ():
            first, last = self.rows_of(block)
            self._compare(path, block, stored[first:last])
            mark()

    def _read_range(self, file: ShardFile, start: int, stop: int, out: Array) -> None:
        begin, end = start, stop
        if begin % self._block_rows:
            begin = self._read_edge(file, begin // self._block_rows, start, stop, out)
        if begin < end and end % self._block_rows and end < self._num_rows:
            self._read_edge(file, end // self._block_rows, start, stop, out)
            end -= end % self._block_rows
        if begin < end:
            file.read_into(self._name, [(begin, end)], out[begin - start : end - start])
            for block in range(*self._blocks(begin, end).indices(len(self._verified))):
                first, last = self.rows_of(block)
                self._compare(file.info.path, block, out[first - start : last - start])

    def _verify_stored(self, file: ShardFile, start: int, stop: int) -> None:
        """Compares the rows of the dataset, of which the field is a part."""
        for block in range(*self._blocks(start, stop).indices(len(self._verified))):
            if not self._verified[block]:
                self._compare(file.info.path, block, file.read_stored(self._name, *self.rows_of(block)))

    def _read_edge(self, file: ShardFile, block: int, start: int, stop: int, out: Array) -> int:
        """Reads a block of which rows are outside `start` to `stop`; returns where it ends within them."""
        first, last = self.rows_of(block)
        begin, end = max(first, start), min(last, stop)
        rows = file.read(self._name, first, last)
        self._compare(file.info.path, block, rows)
        out[begin - start : end - start] = rows[begin - first : end - first]
        return end

    def _compare(self, path: str, block: int, rows: Array) -> None:
        if self._verified[block]:
            return
        if not self.is_good(block, rows):
            raise DataError(describe(path, self._name, *self.rows_of(block)))
        self._verified[block] = True

    def is_good(self, block: int, rows: Array) -> bool:
        """Whether `rows`, all those of `block`, are what was written, as far as the file can say."""
        return self._sums is None or checksum(rows) == int(self._sums[block])

    def rows_of(self, block: int) -> tuple[int, int]:
        """The first row of a block, and the one after its last."""
        return block * self._block_rows, min((block + 1) * self._block_rows, self._num_rows)

    def _blocks(self, start: int, stop: int) -> slice:
        return slice(start // self._block_rows, -(-stop // self._block_rows))


def describe(path: str, name: str, start: int, stop: int) -> str:
    """The message about damaged rows, `start` up to `stop`."""
    return (
        f"{path}: dataset `{name}`, rows {start} to {stop - 1}: not what was written. The file is damaged: "
        "copy or write it again."
    )
