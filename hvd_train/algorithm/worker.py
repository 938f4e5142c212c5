"""What a rank does by itself in a round: k local steps on batches of its own shards. Never communicates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hvd_train.algorithm.header import Work
from hvd_train.algorithm.transformed_reader import TransformedReader
from hvd_train.config.data import LastBatch
from hvd_train.data.batches import next_batch, num_batches
from hvd_train.errors import DataError
from hvd_train.io.stateful import Count, State, checked
from hvd_train.liveness import phase
from hvd_train.tasks.base import Batch

Step = Callable[[Sequence[Batch]], tuple[float, int]]
"""One optimizer step on some batches: the sum of their losses, and their samples."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a `Worker` as a checkpoint holds it."""

    epochs: Count
    reader: dict[str, Any]
    rows: Count | None = None
    steps: Count = 0
    """In place of `rows`, of version 0.1.0."""


def steps_per_epoch(
    samples_per_rank: Sequence[int], batch_size: int, accumulate: int, last_batch: LastBatch = "keep"
) -> int:
    """Local steps until the rank with most samples has taken its last batch. Every rank counts to this
    number, so that all pass from one epoch to the next at the same step; a rank with fewer samples has
    nothing to do in the last ones."""
    return max(-(-num_batches(n, batch_size, last_batch) // accumulate) for n in samples_per_rank)


class Worker:
    """Draws batches and takes local steps. Stateful: the epoch, the step in it, and the reader's cursor.

    Args:
        reader: of this rank's rows, in batches of `batch_size` and `last_batch`.
        step: takes the local step.
        batch_size: samples of a batch.
        accumulate: batches of a local step.
        last_batch: what becomes of rows that are no full batch.
        samples_per_rank: rows of every rank's part; the one with most rows counts the epochs.
    """

    def __init__(
        self,
        reader: TransformedReader,
        step: Step,
        *,
        batch_size: int,
        accumulate: int,
        samples_per_rank: Sequence[int],
        last_batch: LastBatch = "keep",
    ) -> None:
        self._reader = reader
        self._step = step
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._last_batch: LastBatch = last_batch
        self._most_rows = max(samples_per_rank)
        self._steps_per_epoch = steps_per_epoch(samples_per_rank, batch_size, accumulate, last_batch)
        self.epochs = 0
        """Full epochs done; the same on all ranks."""
        self._rows = 0
        """Rows that the steps of this epoch have taken so far on the rank with most rows."""
        self.restarted = False
        """Whether the loaded state does not fit the present rows of this rank, so that its epoch must begin
        anew. Then the epoch of every rank must, or the ranks would not pass to the next at the same step."""
        self._began = reader.state_dict()
        """The state of the reader before the last round."""
        reader.start_epoch(0)

    @property
    def progress(self) -> float:
        """Epochs done, with the part of the current one."""
        return self.epochs + (self._steps_per_epoch - self._steps_left()) / self._steps_per_epoch

    def run(self, period: int) -> Work:
        """`period` local steps. A rank that is out of rows does nothing in the rest of the epoch."""
        self._began = self._reader.state_dict()
        samples, loss_sum = 0, 0.0
        data_s = compute_s = 0.0
        mark = time.perf_counter()
        for _ in range(period):
            batches = self._draw()
            drawn = time.perf_counter()
            if batches:
                phase("local step")
                loss, count = self._step(batches)
                samples += count
                loss_sum += loss
            self._count_step()
            done = time.perf_counter()
            data_s += drawn - mark
            compute_s += done - drawn
            mark = done
        return Work(samples=samples, loss_sum=loss_sum, data_s=data_s, compute_s=compute_s)

    def not_finite(self) -> str:
        """Where the first value that is not finite is among the rows of the last round; empty if all are
        finite. Reads them again; returns the error message if they cannot be read."""
        try:
            return self._reader.not_finite_since(self._began)
        except DataError as error:
            return str(error)

    def _draw(self) -> list[Batch]:
        batches: list[Batch] = []
        for _ in range(self._accumulate):
            batch = self._reader.next_batch()
            if batch is None:
                break
            batches.append(batch)
        return batches

    def _steps_left(self) -> int:
        """Steps until the epoch ends. Counted from its rows, as a resumed run may have other batches."""
        left = self._most_rows - self._rows
        batches = num_batches(left, self._batch_size, self._last_batch, taken=self._rows)
        return -(-batches // self._accumulate)

    def _next_batch(self, left: int, taken: int) -> int:
        return next_batch(left, self._batch_size, self._last_batch, taken=taken)

    def _rows_of_step(self) -> int:
        """Rows that the next step takes on the rank with most rows."""
        left = self._most_rows - self._rows
        taken = 0
        for _ in range(self._accumulate):
            taken += self._next_batch(left - taken, self._rows + taken)
        return taken

    def _count_step(self) -> None:
        self._rows += self._rows_of_step()
        if self._steps_left() == 0:
            self._rows = 0
            self.epochs += 1
            self._reader.start_epoch(self.epochs)

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank in its data."""
        return {"epochs": self.epochs, "rows": self._rows, "reader": self._reader.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continues from there, with the rows that are left in the epoch; see `restarted`."""
        saved = checked(state, _Saved)
        # Older checkpoints count steps; the reader's position shows whether those had such batches.
        rows = saved.steps * self._batch_size * self._accumulate if saved.rows is None else saved.rows
        self._reader.load_state_dict(saved.reader)
        self.epochs, self._rows = saved.epochs, rows
        # That many rows, if this rank had them; at its end it may have taken more at once, or dropped some.
        position, mine = saved.reader["position"], self._reader.num_samples
        fits = saved.rows is not None or position == min(rows, mine) or position == mine == rows + 1
        self.restarted = self._reader.restarted or not fits or rows >= self._most_rows

    def restart_epoch(self) -> None:
        """Goes to the beginning of the current epoch."""
        self._rows = 0
        self._reader.start_epoch(self.epochs)

    def close(self) -> None:
        """Closes the shards."""
        self._reader.close()
