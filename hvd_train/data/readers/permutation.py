"""The order of readers that have any row at hand: a random permutation of all rows, a new one every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.deal import Span
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.readers.cursor import Cursor


@final
class Permutation:
    """The numbers of a part's rows in random order, and the position in it; a new one is at the start of
    epoch 0. The order is the same whatever holds the rows: a run may be resumed with another such reader."""

    def __init__(self, spans: Sequence[Span], seed: int) -> None:
        self._num_rows = sum(span.num_rows for span in spans)
        self._cursor = Cursor(spans, seed, "memory", layout=b"")
        self._order: npt.NDArray[np.intp] = self._cursor.random().permutation(self._num_rows)

    @property
    def left(self) -> int:
        """Rows of the epoch that are still to come."""
        return self._num_rows - self._cursor.position

    def next(self, size: int) -> RowNumbers:
        """The next `size` rows, or those that are left."""
        start, stop = self._cursor.range_of(size, self._num_rows)
        self._cursor.position = stop
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
            self._order = self._cursor.random().permutation(self._num_rows)
        self._cursor.position = position

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        if epoch == self._cursor.epoch:
            return self._order[start:stop]
        return self._cursor.random(epoch=epoch).permutation(self._num_rows)[start:stop]
