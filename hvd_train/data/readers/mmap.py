"""A reader that gathers its rows from mapped files, without a copy of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from hvd_train.data.finite import first_not_finite
from hvd_train.data.mapped import MappedShard
from hvd_train.data.numbering import Origins
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.permutation import Permutation
from hvd_train.data.rows import Rows
from hvd_train.data.screen import MARK, USABLE


@final
class MmapReader(Reader):
    """Maps the files of all rows, and copies out of them the rows of a batch. Every file stays open.

    What has been read is in the page cache of the host, once for all of its ranks, and can be dropped from
    there when memory is short. `DataError` for datasets that are not one piece of their file.
    """

    def __init__(self, rows: Rows, seed: int, *, share: Share = ALONE) -> None:
        self.mode = "mmap"
        self.num_samples = len(rows)
        self.restarted = False
        self._rows = rows
        self._shards: list[MappedShard] = []
        paths = list(dict.fromkeys(span.shard for span in rows.spans))
        number = {path: i for i, path in enumerate(paths)}
        # Of each span: where its rows end among all, their distance to those of the file, the file.
        self._stops = np.cumsum([span.num_rows for span in rows.spans], dtype=np.int64)
        self._shifts = np.array([span.stop for span in rows.spans], np.int64) - self._stops
        self._shard_of = np.array([number[span.shard] for span in rows.spans], np.intp)
        self._paths = paths
        self._is_closed = False
        self._order = Permutation(rows, seed, share)

    @property
    def left(self) -> int:
        return self._order.left

    def open(self) -> None:
        if self._shards or self._is_closed:
            return
        try:
            for path in self._paths:
                self._shards.append(MappedShard(self._rows.shard(path), list(self._rows.fields)))
        except BaseException:
            self.close()
            raise
        self._rows.close()

    def start_epoch(self, epoch: int) -> None:
        self._order.go_to(epoch)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if self._is_closed:
            raise RuntimeError("the reader is closed")
        self.open()
        numbers = self._order.next(size)
        return self._gather(numbers) if len(numbers) else None

    def origins(self, start: int, stop: int) -> Origins:
        return self._rows.origins(self._order.rows_at(start, stop))

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.restarted = self._order.load_state_dict(state)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._order.drawn_since(state))

    def close(self) -> None:
        self._is_closed = True
        while self._shards:
            self._shards.pop().close()
        self._rows.close()

    def _gather(self, numbers: RowNumbers) -> ArrayBatch:
        span = np.searchsorted(self._stops, numbers, side="right")
        rows, shard_of = numbers + self._shifts[span], self._shard_of[span]
        shards = np.unique(shard_of).tolist() if len(self._shards) > 1 else [0]
        if len(shards) == 1:
            return self._take(shards[0], rows)
        batch = self._rows.empty(len(numbers))
        for shard in shards:
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
