"""A reader that gathers its rows from mapped files, without a copy of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from hvd_train.data.finite import first_not_finite
from hvd_train.data.mapped import MappedShard
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers
from hvd_train.data.readers.permutation import Permutation
from hvd_train.data.rows import Rows


@final
class MmapReader(Reader):
    """Maps the files of all rows, and copies out of them the rows of a batch. Every file stays open.

    What has been read is in the page cache of the host, once for all of its ranks, and can be dropped from
    there when memory is short. `DataError` for datasets that are not one piece of their file.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.mode = "mmap"
        self.num_samples = len(rows)
        self.restarted = False
        self._rows = rows
        ranges: dict[str, list[tuple[int, int]]] = {}
        for span in rows.spans:
            ranges.setdefault(span.shard, []).append((span.start, span.stop))
        number = {path: i for i, path in enumerate(ranges)}
        self._shards: list[MappedShard] = []
        try:
            for path in ranges:
                self._shards.append(MappedShard(rows.shard(path), list(rows.fields), ranges[path]))
        except BaseException:
            self.close()
            raise
        rows.close()
        # Of each span: where its rows end among all, their distance to those of the file, the file.
        self._stops = np.cumsum([span.num_rows for span in rows.spans], dtype=np.int64)
        self._shifts = np.array([span.stop for span in rows.spans], np.int64) - self._stops
        self._shard_of = np.array([number[span.shard] for span in rows.spans], np.intp)
        self._is_one_file = self._shifts.tolist() == [0]
        """Whether the rows are those of a file from its first on, with the same numbers."""
        self._order = Permutation(rows.spans, seed)

    @property
    def left(self) -> int:
        return self._order.left

    def start_epoch(self, epoch: int) -> None:
        self._order.go_to(epoch)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if self.num_samples and not self._shards:
            raise RuntimeError("the reader is closed")
        numbers = self._order.next(size)
        return self._gather(numbers) if len(numbers) else None

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.restarted = self._order.load_state_dict(state)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._order.drawn_since(state))

    def close(self) -> None:
        while self._shards:
            self._shards.pop().close()
        self._rows.close()

    def _gather(self, numbers: RowNumbers) -> ArrayBatch:
        if self._is_one_file:
            return self._shards[0].take(numbers)
        span = self._stops.searchsorted(numbers, side="right")
        rows = numbers + self._shifts[span]
        if len(self._shards) == 1:
            return self._shards[0].take(rows)
        shard_of = self._shard_of[span]
        batch = self._rows.empty(len(numbers))
        for shard in np.unique(shard_of).tolist():
            at = np.flatnonzero(shard_of == shard)
            for name, values in self._shards[shard].take(rows[at]).items():
                batch[name][at] = values
        return batch
