"""The next batch is gathered while the training thread takes a step on the one before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

from hvd_train.config.data import LastBatch
from hvd_train.data.batches import next_batch
from hvd_train.data.numbering import Origins
from hvd_train.data.readers.base import ArrayBatch, Reader

_WORTHWHILE_S = 200e-6
"""Seconds for which a batch is left to the other thread. To pass it on takes some tens of microseconds, which
a rank without a core to spare loses; a batch of MNIST takes about ten."""


@final
class ReadsAhead(Reader):
    """Another reader's batches, each gathered in a background thread if the one before took long enough for
    that to save time. Batches and states are those of the other reader: `state_dict` is that after the batch
    which was returned last, whatever has been gathered since.

    Args:
        reader: belongs to this one from now on, and is closed with it.
        batch_size, last_batch: the next batch is expected to have the size that `next_batch` gives for them.
            Another size is read as well, without a gain.
        worthwhile_s: seconds that a batch must take to have the next one gathered in the background.
    """

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        last_batch: LastBatch = "keep",
        *,
        worthwhile_s: float = _WORTHWHILE_S,
    ) -> None:
        self.mode, self.why = reader.mode, reader.why
        self.num_samples = reader.num_samples
        self.restarted = reader.restarted
        self._reader = reader
        self._batch_size = batch_size
        self._last_batch: LastBatch = last_batch
        self._worthwhile_s = worthwhile_s
        self._took_s = 0.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hvd_train-ahead")
        self._pending: tuple[int, Future[ArrayBatch | None]] | None = None
        self._note()

    @property
    def left(self) -> int:
        return self._left

    def open(self) -> None:
        self._reader.open()

    def start_epoch(self, epoch: int) -> None:
        self._wait()
        self._reader.start_epoch(epoch)
        self._note()
        self._read_ahead()

    def next_batch(self, size: int) -> ArrayBatch | None:
        if self._pending is not None and self._pending[0] == size:
            (_, future), self._pending = self._pending, None
            batch = future.result()
        else:
            self._go_back()
            batch = self._read(size)
        self._note()
        self._read_ahead()
        return batch

    def origins(self, start: int, stop: int) -> Origins:
        return self._reader.origins(start, stop)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._wait()
        self._reader.load_state_dict(state)
        self.restarted = self._reader.restarted
        self._note()

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        self._go_back()
        return self._reader.not_finite_since(state)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending = None
        self._reader.close()

    def _note(self) -> None:
        """Where the other reader is, with nothing under way."""
        self._state, self._left = self._reader.state_dict(), self._reader.left

    def _read(self, size: int) -> ArrayBatch | None:
        began = time.perf_counter()
        batch = self._reader.next_batch(size)
        self._took_s = time.perf_counter() - began
        return batch

    def _read_ahead(self) -> None:
        if self._took_s >= self._worthwhile_s:
            taken = self.num_samples - self._left
            size = next_batch(self._left, self._batch_size, self._last_batch, taken=taken)
            if size:
                self._pending = size, self._executor.submit(self._read, size)

    def _wait(self) -> bool:
        """Until nothing is under way; returns whether something was. What it brought is dropped, an error
        too: the batch is not asked for, or is read again."""
        if self._pending is None:
            return False
        future, self._pending = self._pending[1], None
        future.exception()
        return True

    def _go_back(self) -> None:
        """To where the other reader was after the batch that was returned last."""
        if self._wait():
            self._reader.load_state_dict(self._state)
