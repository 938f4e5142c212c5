"""The order of readers that have any row at hand: a random permutation of all rows, a new one every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.readers.cursor import ALONE, Cursor, Share

ORDER_BYTES = 16
"""Of a row in the order of an epoch: when an epoch begins, the order of the one before still exists."""


def cursor_of(rows: AnyRows, seed: int, share: Share = ALONE) -> Cursor:
    """That of a reader of these rows."""
    return Cursor(rows, seed, "memory", layout=b"", share=share)


def order_of(rows: AnyRows, cursor: Cursor, epoch: int | None = None) -> npt.NDArray[np.intp]:
    """The order of these rows in `epoch` (default: the cursor's). `DataError` without memory for it."""
    try:
        return cursor.random(epoch=epoch).permutation(len(rows))
    except MemoryError:
        raise rows.too_large(len(rows), len(rows) * (rows.row_bytes + ORDER_BYTES)) from None


@final
class Permutation:
    """The numbers of a part's rows in random order, and the position in it; a new one is at the start of
    epoch 0. The order is the same whatever holds the rows: a run may be resumed with another such reader."""

    def __init__(self, rows: AnyRows, seed: int, share: Share = ALONE) -> None:
        self._rows = rows
        self._num_rows = len(rows)
        self._cursor = cursor_of(rows, seed, share)
        self._order = order_of(rows, self._cursor)

    @property
    def left(self) -> int:
        """Rows of the epoch that are still to come."""
        return self._num_rows - self._cursor.position

    def next(self, size: int) -> RowNumbers:
        """The next `size` rows, or those that are left; of a batch that ranks share, this rank's share."""
        start, stop = self._cursor.advance(size, self._num_rows)
        return self._order[start:stop]

    def rows_at(self, start: int, stop: int) -> RowNumbers:
        """The rows at these positions of the epoch."""
        return self._order[start:stop]

    def drawn_since(self, state: Mapping[str, Any]) -> RowNumbers:
        """As `Cursor.drawn_since`."""
        return self._cursor.drawn_since(state, self._num_rows, self._rows_at)

    def state_dict(self) -> dict[str, Any]:
        """As `Reader.state_dict`."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """As `Reader.load_state_dict`; returns whether the state is that of another part."""
        epoch, position, restarted = self._cursor.read(state, self._num_rows)
        self.go_to(epoch, position)
        return restarted

    def go_to(self, epoch: int, position: int = 0) -> None:
        """Sets the order of `epoch`, and goes to a position in it."""
        if epoch != self._cursor.epoch:
            self._cursor.epoch = epoch
            self._order = order_of(self._rows, self._cursor)
        self._cursor.position = position

    def close(self) -> None:
        """Frees the order. `drawn_since` still answers."""
        self._order = np.empty(0, np.intp)

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        return order_of(self._rows, self._cursor, epoch)[start:stop]
