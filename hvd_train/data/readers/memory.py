"""A reader that holds all of its rows in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from hvd_train.data.finite import first_not_finite
from hvd_train.data.readers.base import ArrayBatch, Reader, gather
from hvd_train.data.readers.permutation import Permutation
from hvd_train.data.rows import Rows


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored; closes `rows` once they are read."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._batch = rows.read(0, len(rows))
        self._rows = rows
        rows.close()
        self._order = Permutation(rows.spans, seed)

    @property
    def left(self) -> int:
        return self._order.left

    def start_epoch(self, epoch: int) -> None:
        self._order.go_to(epoch)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if not self._batch:
            raise RuntimeError("the reader is closed")
        numbers = self._order.next(size)
        return gather(self._batch, numbers) if len(numbers) else None

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.restarted = self._order.load_state_dict(state)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._order.drawn_since(state))

    def close(self) -> None:
        self._batch = {}
