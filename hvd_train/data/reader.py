"""Readers: the shuffled batches of one rank's rows, epoch by epoch."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath
from typing import Any, Literal, final

import msgspec
import numpy as np
import numpy.typing as npt

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.finite import first_not_finite
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.rows import Rows
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS, Blocks, cut
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import Count, checked

ArrayBatch = dict[str, Array]
RowNumbers = npt.NDArray[np.int64]

Mode = Literal["memory", "stream"]

_ORDER_BYTES = 16
"""Of a row in the order of an epoch: when an epoch begins, the order of the one before still exists."""


class Reader(ABC):
    """The rows of one rank in an order that is a pure function of (seed, epoch, the rank's part).

    A new reader is at the start of epoch 0. No method is collective. `DataError` where a shard
    cannot be read.
    """

    mode: Mode
    """Which implementation this is."""

    num_samples: int
    """Rows of this rank's part; 0 for a rank without rows."""

    restarted: bool
    """Whether the last `load_state_dict` came from another part of the data (another world size, seed
    or mode), so that its epoch began anew instead of going on where it was."""

    @property
    @abstractmethod
    def left(self) -> int:
        """Rows of this epoch that are still to come."""

    @abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Sets the order of `epoch` and goes to its start."""

    @abstractmethod
    def next_batch(self, size: int) -> ArrayBatch | None:
        """The next `size` rows: {name: array [rows, *shape]}, in memory that is the caller's.

        The last batch of an epoch may be smaller: no row is dropped and none comes twice. None once the
        epoch is exhausted, at once for a rank without rows.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and a fingerprint of what they refer to. JSON scalars only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken: the next batch is the one that came next there.

        The state of another part goes to the start of its epoch instead, and sets `restarted`.
        """

    @abstractmethod
    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        """Which of the rows drawn since `state` was taken is the first with a value that is not finite; empty
        if none is. See `first_not_finite`; reads the rows again."""

    @abstractmethod
    def close(self) -> None:
        """Ends the reader's thread and closes its files. May be called twice."""


def make_reader(
    spans: Sequence[Span],
    data: DataConfig,
    seed: int,
    fields: Mapping[str, FieldSpec],
    memory_budget_bytes: int,
) -> Reader:
    """The reader of one rank's part; `data.reading` chooses, `auto` takes memory where the part fits
    into `memory_budget_bytes`. `reader.mode` says which it became."""
    rows = Rows(spans, fields)
    if data.reading == "memory" or (data.reading == "auto" and _fits(rows, memory_budget_bytes)):
        return MemoryReader(rows, seed)
    return StreamReader(rows, seed)


def _fits(rows: Rows, budget_bytes: int) -> bool:
    """Whether all rows fit into memory, and the largest of their chunks while it is decoded."""
    left = budget_bytes - len(rows) * (rows.row_bytes + _ORDER_BYTES)
    if left < 0:
        return False
    return all(layout.decoding_bytes <= left for _, layouts in rows.layouts() for layout in layouts.values())


@final
class MemoryReader(Reader):
    """Holds all rows in memory, in the dtypes in which they are stored; closes `rows` once they are read."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.mode = "memory"
        self.num_samples = len(rows)
        self.restarted = False
        self._cursor = _Cursor(rows.spans, seed, self.mode, layout=b"")
        self._batch = rows.read(0, len(rows))
        self._rows = rows
        rows.close()
        self._order: npt.NDArray[np.intp] = self._permutation(self._cursor.epoch)

    @property
    def left(self) -> int:
        return self.num_samples - self._cursor.position

    def start_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def next_batch(self, size: int) -> ArrayBatch | None:
        if not self._batch:
            raise RuntimeError("the reader is closed")
        start, stop = self._cursor.range_of(size, self.num_samples)
        if start == stop:
            return None
        batch = _gather(self._batch, self._order[start:stop])
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
        self._batch = {}

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        if epoch == self._cursor.epoch:
            return self._order[start:stop]
        return self._permutation(epoch)[start:stop]

    def _permutation(self, epoch: int) -> npt.NDArray[np.intp]:
        try:
            return self._cursor.random(epoch=epoch).permutation(self.num_samples)
        except MemoryError:
            num_bytes = self.num_samples * (self._rows.row_bytes + _ORDER_BYTES)
            raise self._rows.too_large(self.num_samples, num_bytes) from None

    def _go_to(self, epoch: int, position: int) -> None:
        if epoch != self._cursor.epoch:
            self._cursor.epoch = epoch
            self._order = self._permutation(epoch)
        self._cursor.position = position


@final
class StreamReader(Reader):
    """Reads blocks of rows in random order, and mixes the rows of a window of blocks in memory.

    While one window is consumed, a background thread reads the next, so at most two are in memory. Blocks
    and windows are those of `windows.cut`. `DataError` where the chunks of a file do not allow it.
    """

    def __init__(
        self, rows: Rows, seed: int, *, block_bytes: int = BLOCK_BYTES, window_blocks: int = WINDOW_BLOCKS
    ) -> None:
        self.mode = "stream"
        self.num_samples = len(rows)
        self.restarted = False
        self._rows = rows
        self._blocks, window_blocks = cut(rows, block_bytes, window_blocks)
        # Windows of equal size: a last one of few blocks would hardly be mixed.
        self._num_windows = -(-len(self._blocks) // window_blocks)
        self._cursor = _Cursor(
            rows.spans, seed, self.mode, layout=self._blocks.tobytes() + bytes(str(window_blocks), "ascii")
        )
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="hvd_train-reader")
        self._current: ArrayBatch = {}
        self._order: npt.NDArray[np.intp] = np.empty(0, np.intp)
        self._loading: tuple[int, int, Future[ArrayBatch]] | None = None
        self._plan()

    @property
    def left(self) -> int:
        return self.num_samples - self._cursor.position

    def start_epoch(self, epoch: int) -> None:
        self._go_to(epoch, 0)

    def next_batch(self, size: int) -> ArrayBatch | None:
        start, stop = self._cursor.range_of(size, self.num_samples)
        pieces = []
        while start < stop:
            self._enter_window_of(start)
            first, last = self._bounds[self._window : self._window + 2]
            end = min(stop, last)
            pieces.append(_gather(self._current, self._order[start - first : end - first]))
            start = end
        self._cursor.position = stop
        if len(pieces) < 2:
            return pieces[0] if pieces else None
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def state_dict(self) -> dict[str, Any]:
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position, self.restarted = self._cursor.read(state, self.num_samples)
        self._go_to(epoch, position)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        return first_not_finite(self._rows, self._cursor.drawn_since(state, self.num_samples, self._rows_at))

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

    def _rows_at(self, epoch: int, start: int, stop: int) -> RowNumbers:
        """The rows at these positions of an epoch, in the order of the windows and of the rows in each."""
        drawn, first = [np.empty(0, np.int64)], 0
        for window, blocks in enumerate(self._windows_of(epoch)):
            last = first + _num_rows(blocks)
            if first < stop and start < last:
                rows = np.concatenate([np.arange(*block) for block in sorted(blocks.tolist())])
                order = self._cursor.random(window, epoch=epoch).permutation(len(rows))
                drawn.append(rows[order[max(start - first, 0) : stop - first]])
            first = last
        return np.concatenate(drawn)

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
        else:
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


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a reader as a checkpoint holds it."""

    epoch: Count
    position: Count
    fingerprint: str


class _Cursor:
    """The position of a reader, and the random generators that belong to its part of the data."""

    def __init__(self, spans: Sequence[Span], seed: int, mode: Mode, layout: bytes) -> None:
        # Names without folders: data that moved to another place is still the same data.
        part = [[PurePath(span.shard).name, span.start, span.stop] for span in spans]
        digest = hashlib.blake2b(json.dumps([part, seed, mode]).encode(), digest_size=16)
        digest.update(layout)
        self.fingerprint = digest.hexdigest()
        self.epoch = 0
        self.position = 0

    def random(self, *stream: int, epoch: int | None = None) -> np.random.Generator:
        """A generator for `epoch` (default: the cursor's), a different one for each `stream`."""
        entropy = (int(self.fingerprint, 16), self.epoch if epoch is None else epoch, *stream)
        return np.random.default_rng(np.random.SeedSequence(entropy))

    def range_of(self, size: int, num_samples: int) -> tuple[int, int]:
        """The positions of the next `size` rows, or of those that are left."""
        if size < 1:
            raise ValueError(f"a batch of {size} rows: expected at least 1")
        return self.position, min(self.position + size, num_samples)

    def drawn_since(
        self, state: Mapping[str, Any], num_samples: int, rows_at: Callable[[int, int, int], RowNumbers]
    ) -> RowNumbers:
        """The numbers of the rows drawn since `state` was taken, in the order in which they were drawn first.

        Args:
            rows_at: the rows of an epoch from one position up to another.
        """
        began = state["epoch"]
        # What is left of its epoch and one epoch more are all rows.
        epochs = range(began, min(self.epoch, began + 1) + 1)
        starts = (state["position"] if epoch == began else 0 for epoch in epochs)
        stops = (self.position if epoch == self.epoch else num_samples for epoch in epochs)
        return np.concatenate([rows_at(*part) for part in zip(epochs, starts, stops, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "fingerprint": self.fingerprint}

    def read(self, state: Mapping[str, Any], num_samples: int) -> tuple[int, int, bool]:
        """Epoch, position, and whether the epoch is to be restarted. Raises `RunDirectoryError`."""
        saved = checked(state, _Saved)
        if saved.fingerprint != self.fingerprint:
            return saved.epoch, 0, True
        if saved.position > num_samples:
            raise RunDirectoryError(f"`position` is {saved.position}, of {num_samples} rows")
        return saved.epoch, saved.position, False


def _gather(batch: ArrayBatch, index: npt.NDArray[np.intp]) -> ArrayBatch:
    return {name: array.take(index, axis=0, mode="clip") for name, array in batch.items()}


def _num_rows(blocks: Blocks) -> int:
    return int((blocks[:, 1] - blocks[:, 0]).sum())


def _read_blocks(rows: Rows, blocks: Blocks) -> ArrayBatch:
    batch = rows.empty(_num_rows(blocks))
    at = 0
    # In file order: the window is mixed in memory anyway, and reading forwards is what disks do best.
    for start, stop in sorted(blocks.tolist()):
        rows.read_into(batch, at, start, stop)
        at += stop - start
    return batch
