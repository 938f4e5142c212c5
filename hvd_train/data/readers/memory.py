"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.finite import first_not_finite
from hvd_train.data.numbering import Origins
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers, gather
from hvd_train.data.readers.cursor import Cursor
from hvd_train.data.rows import Rows


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored; closes `rows` once they are read."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._cursor = Cursor(rows.spans, seed, self.mode, layout=b"")
        self._batch = rows.read(0, len(rows))
        self._rows = rows
        rows.close()
        self._order: npt.NDArray[np.intp] = self._cursor.random().permutation(self.num_samples)

    @property
    def left(self) -> int:
        return self.num_samples - self._cursor.position

    def start_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if not self._batch:
            raise RuntimeError("the reader is closed")
        start, stop = self._cursor.range_of(size, self.num_samples)
        if start == stop:
            return None
        batch = gather(self._batch, self._order[start:stop])
        self._cursor.position = stop
        return batch

    def origins(self, start: int, stop: int) -> Origins:
        return self._rows.origins(self._order[start:stop])

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position, self.restarted = self._cursor.read(state, self.num_samples)
        self._go_to(epoch, position)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._cursor.drawn_since(state, self.num_samples, self._rows_at))

    def close(self) -> None:
        self._batch = {}

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        if epoch == self._cursor.epoch:
            return self._order[start:stop]
        return self._cursor.random(epoch=epoch).permutation(self.num_samples)[start:stop]

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._cursor.epoch:
            self._cursor.epoch = epoch
            self._order = self._cursor.random().permutation(self.num_samples)
        self._cursor.position = position
