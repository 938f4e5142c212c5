"""An average that a thread of the extension `_shm` or `_ring` works on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, final

from torch import Tensor

from hvd_train.comm.base import OnSlice, Pending
from hvd_train.comm.buffer import Buffer

if TYPE_CHECKING:
    from hvd_train.comm import _shm


@final
class InBackground(Pending):
    """An average that has begun.

    Args:
        operation: does it; None: there is no weight.
        waiting: around what may raise the extension's errors: translates them.
        over: tells the communicator that it may be called again.
    """

    def __init__(
        self,
        buffer: Buffer,
        staged: Tensor,
        operation: _shm.Operation | None,
        on_slice: OnSlice | None,
        waiting: Callable[[], AbstractContextManager[None]],
        over: Callable[[], None],
    ) -> None:
        self.staged = staged
        self._buffer = buffer
        self._operation = operation
        self._on_slice = on_slice
        self._waiting = waiting
        self._over = over
        self._is_over = False

    def test(self) -> bool:
        return self._operation is None or self._operation.test()

    def wait(self) -> bool:
        if not self._is_over:
            self._is_over = True
            try:
                if self._operation is not None:
                    self._complete(self._operation)
            finally:
                self._over()
        return self._operation is not None

    def _complete(self, operation: _shm.Operation) -> None:
        with self._waiting():
            operation.wait()
            if self._on_slice is not None:
                self._over()  # a slice step may reduce a few values
                self._on_slice(self._buffer.owned, self._buffer.start)
                operation.spread()
        self._buffer.advance()
