"""A reader in bounded memory, which mixes the rows of a window of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.finite import first_not_finite
from hvd_train.data.numbering import Origins
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers, gather
from hvd_train.data.readers.cursor import ALONE, Cursor, Share
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS, Blocks, cut


@final
class StreamReader(Reader):
    """Reads blocks of rows in random order, and mixes the rows of a window of blocks in memory.

    While one window is consumed, a background thread reads the next, so at most two are in memory. Blocks
    and windows are those of `windows.cut`. `DataError` where the chunks of a file do not allow it.

    Args:
        repeats: the next epoch reads the same rows, so that its first window may be read ahead.
        share: what this rank takes of every batch.
    """

    def __init__(
        self,
        rows: AnyRows,
        seed: int,
        *,
        block_bytes: int = BLOCK_BYTES,
        window_blocks: int = WINDOW_BLOCKS,
        repeats: bool = True,
        share: Share = ALONE,
    ) -> None:
        self.mode = "stream"
        self.num_samples = len(rows)
        self.restarted = False
        self._rows = rows
        self._repeats = repeats
        self._blocks, window_blocks = cut(rows, block_bytes, window_blocks)
        # Windows of equal size: a last one of few blocks would hardly be mixed.
        self._num_windows = -(-len(self._blocks) // window_blocks)
        self._cursor = Cursor(
            rows,
            seed,
            self.mode,
            layout=self._blocks.tobytes() + bytes(str(window_blocks), "ascii"),
            share=share,
        )
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hvd_train-reader")
        self._current: ArrayBatch = {}
        self._order: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._loading: tuple[int, int, Future[ArrayBatch]] | None = None
        self._numbered: tuple[tuple[int, int], RowNumbers] = ((-1, -1), np.empty(0, np.int64))
        """The rows of the window that was asked for last."""
        self._plan()

    @property
    def left(self) -> int:
        return self.num_samples - self._cursor.position

    def open(self) -> None:
        """Does nothing: windows are read when they are needed."""

    def start_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def next_batch(self, size: int) -> ArrayBatch | None:
        start, stop = self._cursor.advance(size, self.num_samples)
        pieces = []
        while start < stop:
            self._enter_window_of(start)
            first, last = self._bounds[self._window : self._window + 2]
            end = min(stop, last)
            pieces.append(gather(self._current, self._order[start - first : end - first]))
            start = end
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def origins(self, start: int, stop: int) -> Origins:
        return self._rows.origins(self.rows_at(self._cursor.epoch, start, stop))

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position, self.restarted = self._cursor.read(state, self.num_samples)
        self._go_to(epoch, position)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._cursor.drawn_since(state, self.num_samples, self.rows_at))

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._loading = None
        self._window, self._current = -1, {}
        self._rows.close()

    def _go_to(self, epoch: int, position: int) -> None:
        self._cursor.epoch = epoch
        self._cursor.position = position
        self._plan()
        if position < self.num_samples:
            self._load(epoch, self._window_of(position))

    def _plan(self) -> None:
        """The windows of the cursor's epoch: lists of blocks, and the position at which each begins."""
        self._windows = self._windows_of(self._cursor.epoch)
        sizes = [_num_rows(window) for window in self._windows]
        self._bounds: list[int] = np.cumsum([0, *sizes]).tolist()
        self._window = -1
        self._current = {}

    def rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        """The rows at these positions of an epoch, in the order of the windows and of the rows in each."""
        drawn, first = [np.empty(0, np.int64)], 0
        windows = self._windows if epoch == self._cursor.epoch else self._windows_of(epoch)
        for window, blocks in enumerate(windows):
            last = first + _num_rows(blocks)
            if first < stop and start < last:
                drawn.append(self._rows_of(epoch, window, blocks)[max(start - first, 0) : stop - first])
            first = last
        return np.concatenate(drawn)

    def _rows_of(self, epoch: int, window: int, blocks: Blocks) -> RowNumbers:
        """The rows of a window in the order in which they are drawn."""
        if self._numbered[0] != (epoch, window):
            rows = np.concatenate([np.arange(*block) for block in sorted(blocks.tolist())])
            order = self._cursor.random(window, epoch=epoch).permutation(len(rows))
            self._numbered = ((epoch, window), rows[order])
        return self._numbered[1]

    def _windows_of(self, epoch: int) -> list[Blocks]:
        order = self._cursor.random(epoch=epoch).permutation(len(self._blocks))
        return [self._blocks[window] for window in np.array_split(order, max(1, self._num_windows))]

    def _window_of(self, position: int) -> int:
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def _enter_window_of(self, position: int) -> None:
        window, epoch = self._window_of(position), self._cursor.epoch
        if window == self._window:
            return
        # The window after this one is read only once this one has taken the place of the last: at most two.
        self._current = self._load(epoch, window).result()
        self._window = window
        num_rows = self._bounds[window + 1] - self._bounds[window]
        self._order = self._cursor.random(window).permutation(num_rows)
        if window + 1 < len(self._windows):
            self._load(epoch, window + 1)
        elif self._repeats:
            self._load(epoch + 1, 0)

    def _load(self, epoch: int, window: int) -> Future[ArrayBatch]:
        """Starts reading a window, unless that is under way; it takes the place of any other."""
        if self._loading is not None:
            if self._loading[:2] == (epoch, window):
                return self._loading[2]
            self._loading[2].cancel()
        windows = self._windows if epoch == self._cursor.epoch else self._windows_of(epoch)
        future = self._executor.submit(_read_blocks, self._rows, windows[window])
        self._loading = (epoch, window, future)
        return future


def _num_rows(blocks: Blocks) -> int:
    return int((blocks[:, 1] - blocks[:, 0]).sum())


def _read_blocks(rows: AnyRows, blocks: Blocks) -> ArrayBatch:
    batch = rows.empty(_num_rows(blocks))
    at = 0
    # In file order: the window is mixed in memory anyway, and reading forwards is what disks do best.
    for start, stop in sorted(blocks.tolist()):
        rows.read_into(batch, at, start, stop)
        at += stop - start
    return batch
