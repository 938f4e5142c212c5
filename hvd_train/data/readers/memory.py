"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from hvd_train.data.finite import first_not_finite
from hvd_train.data.numbering import Origins
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader, gather
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.permutation import Permutation


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored.

    They are read in `open`, which closes `rows`.
    """

    def __init__(self, rows: AnyRows, seed: int, *, share: Share = ALONE) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._batch: ArrayBatch = {}
        self._is_open, self._is_closed = False, False
        self._rows = rows
        self._order = Permutation(rows, seed, share)

    @property
    def left(self) -> int:
        return self._order.left

    def open(self) -> None:
        if self._is_open:
            return
        self._batch = self._rows.read(0, self.num_samples)
        self._rows.close()
        self._is_open = True

    def start_epoch(self, epoch: int) -> None:
        self._order.go_to(epoch)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if self._is_closed:
            raise RuntimeError("the reader is closed")
        self.open()
        numbers = self._order.next(size)
        return gather(self._batch, numbers) if len(numbers) else None

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
        self._batch = {}
        self._order.close()
