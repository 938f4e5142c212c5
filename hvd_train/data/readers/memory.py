"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.finite import first_not_finite
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers, gather
from hvd_train.data.readers.cursor import Cursor

ORDER_BYTES = 16
"""Of a row in the order of an epoch: when an epoch begins, the order of the one before still exists."""


def cursor_of(rows: AnyRows, seed: int) -> Cursor:
    """That of a reader of these rows."""
    return Cursor(rows, seed, "memory", layout=b"")


def order_of(rows: AnyRows, cursor: Cursor, epoch: int | None = None) -> npt.NDArray[np.intp]:
    """The order of these rows in `epoch` (default: the cursor's). `DataError` without memory for it."""
    try:
        return cursor.random(epoch=epoch).permutation(len(rows))
    except MemoryError:
        raise rows.too_large(len(rows), len(rows) * (rows.row_bytes + ORDER_BYTES)) from None


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored.

    They are read in `open`, which closes `rows`.
    """

    def __init__(self, rows: AnyRows, seed: int) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._cursor = cursor_of(rows, seed)
        self._batch: ArrayBatch = {}
        self._is_open, self._is_closed = False, False
        self._rows = rows
        self._order = order_of(self._rows, self._cursor)

    @property
    def left(self) -> int:
        return self.num_samples - self._cursor.position

    def open(self) -> None:
        if self._is_open:
            return
        self._batch = self._rows.read(0, self.num_samples)
        self._rows.close()
        self._is_open = True

    def start_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if self._is_closed:
            raise RuntimeError("the reader is closed")
        self.open()
        start, stop = self._cursor.range_of(size, self.num_samples)
        if start == stop:
            return None
        batch = gather(self._batch, self._order[start:stop])
        self._cursor.position = stop
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position, self.restarted = self._cursor.read(state, self.num_samples)
        self._go_to(epoch, position)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._cursor.drawn_since(state, self.num_samples, self._rows_at))

    def close(self) -> None:
        self._is_closed = True
        self._batch, self._order = {}, np.empty(0, np.intp)

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        return order_of(self._rows, self._cursor, epoch)[start:stop]

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._cursor.epoch:
            self._cursor.epoch = epoch
            self._order = order_of(self._rows, self._cursor)
        self._cursor.position = position
