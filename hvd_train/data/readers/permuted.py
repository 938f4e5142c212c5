"""What readers have in common that have any row at hand: the order is a permutation of all rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from hvd_train.data.finite import first_not_finite
from hvd_train.data.numbering import Origins
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers
from hvd_train.data.readers.cursor import Share
from hvd_train.data.readers.permutation import Permutation


class PermutedReader(Reader):
    """Its orders and states are those of every other such reader of these rows."""

    def __init__(self, rows: AnyRows, seed: int, share: Share) -> None:
        self._rows = rows
        self.num_samples = len(rows)
        self.restarted = False
        self._is_closed = False
        self._order = Permutation(rows, seed, share)

    @abstractmethod
    def _gather(self, numbers: RowNumbers) -> ArrayBatch:
        """These rows, in this order, in memory of their own."""

    @property
    def left(self) -> int:
        return self._order.left

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
