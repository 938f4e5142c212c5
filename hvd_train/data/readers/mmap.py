"""A reader that gathers its rows from mapped files, without a copy of them."""

from __future__ import annotations

from typing import final

import numpy as np

from hvd_train.data.mapped import MappedShard
from hvd_train.data.readers.base import ArrayBatch, RowNumbers
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.permuted import PermutedReader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import MARK, USABLE
from hvd_train.errors import DataError


@final
class MmapReader(PermutedReader):
    """Maps the files of all rows, and copies out of them the rows of a batch. Every file stays open.

    What has been read is in the page cache of the host, once for all of its ranks, and can be dropped from
    there when memory is short. `DataError` for datasets that are not one piece of their file.
    """

    _rows: Rows

    def __init__(self, rows: Rows, seed: int, *, share: Share = ALONE) -> None:
        super().__init__(rows, seed, share)
        self.mode = "mmap"
        self._shards: list[MappedShard] = []
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        for span in rows.spans:
            self._ranges.setdefault(span.shard, []).append((span.start, span.stop))
        paths = list(self._ranges)
        number = {path: i for i, path in enumerate(paths)}
        # Of each span: where its rows end among all, their distance to those of the file, the file.
        self._stops = np.cumsum([span.num_rows for span in rows.spans], dtype=np.int64)
        self._shifts = np.array([span.stop for span in rows.spans], np.int64) - self._stops
        self._shard_of = np.array([number[span.shard] for span in rows.spans], np.intp)
        self._is_one_file = self._shifts.tolist() == [0]
        """Whether the rows are those of a file from its first on, with the same numbers."""
        self._paths = paths

    def open(self) -> None:
        if self._shards or self._is_closed:
            return
        try:
            for path in self._paths:
                file, fields = self._rows.shard(path).file, list(self._rows.fields)
                if file is None:
                    raise DataError(
                        f"{path}: with data.reading = 'mmap', it is a Python dataset; expected files, which "
                        "are mapped into memory. Choose `memory` or `stream`."
                    )
                self._shards.append(MappedShard(file, fields, self._ranges[path]))
        except BaseException:
            self.close()
            raise
        self._rows.close()

    def close(self) -> None:
        self._is_closed = True
        while self._shards:
            self._shards.pop().close()
        self._rows.close()

    def _gather(self, numbers: RowNumbers) -> ArrayBatch:
        if self._is_one_file:
            return self._take(0, numbers)
        span = self._stops.searchsorted(numbers, side="right")
        rows = numbers + self._shifts[span]
        if len(self._shards) == 1:
            return self._take(0, rows)
        shard_of = self._shard_of[span]
        batch = self._rows.empty(len(numbers))
        for shard in np.unique(shard_of).tolist():
            at = np.flatnonzero(shard_of == shard)
            for name, values in self._take(shard, rows[at]).items():
                batch[name][at] = values
        return batch

    def _take(self, shard: int, rows: RowNumbers) -> ArrayBatch:
        """Rows of one file, with their marks if there is a screen."""
        batch = self._shards[shard].take(rows)
        if self._rows.screen is not None:
            marks = np.full(len(rows), USABLE, np.uint8)
            ranges = [(row, row + 1) for row in rows.tolist()]
            self._rows.screen.mark(self._paths[shard], ranges, batch, marks)
            batch[MARK] = marks
        return batch
