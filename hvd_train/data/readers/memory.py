"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.finite import first_not_finite
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers, gather
from hvd_train.data.readers.cursor import ALONE, Cursor, Share


def cursor_of(rows: AnyRows, seed: int, share: Share = ALONE) -> Cursor:
    """That of a reader of these rows."""
    return Cursor(rows, seed, "memory", layout=b"", share=share)


def order_of(cursor: Cursor, num_samples: int, epoch: int | None = None) -> npt.NDArray[np.intp]:
    """The order of its rows in `epoch` (default: the cursor's)."""
    return cursor.random(epoch=epoch).permutation(num_samples)


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored.

    They are read in `open`, which closes `rows`.
    """

    def __init__(self, rows: AnyRows, seed: int, *, share: Share = ALONE) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._cursor = cursor_of(rows, seed, share)
        self._batch: ArrayBatch = {}
        self._is_open, self._is_closed = False, False
        self._rows = rows
        self._order = order_of(self._cursor, self.num_samples)

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
        start, stop = self._cursor.advance(size, self.num_samples)
        return gather(self._batch, self._order[start:stop]) if start < stop else None

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
        return order_of(self._cursor, self.num_samples, epoch)[start:stop]

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._cursor.epoch:
            self._cursor.epoch = epoch
            self._order = order_of(self._cursor, self.num_samples)
        self._cursor.position = position
