"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from typing import final

from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, RowNumbers, gather
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.permuted import PermutedReader


@final
class MemoryReader(PermutedReader):
    """Holds all rows in memory, in the dtypes in which they are stored.

    They are read in `open`, which closes `rows`.
    """

    def __init__(self, rows: AnyRows, seed: int, *, share: Share = ALONE) -> None:
        super().__init__(rows, seed, share)
        self.mode = "memory"
        self._batch: ArrayBatch = {}
        self._is_open = False

    def open(self) -> None:
        if self._is_open:
            return
        self._batch = self._rows.read(0, self.num_samples)
        self._rows.close()
        self._is_open = True

    def _gather(self, numbers: RowNumbers) -> ArrayBatch:
        return gather(self._batch, numbers)

    def close(self) -> None:
        self._is_closed = True
        self._batch = {}
        self._order.close()
