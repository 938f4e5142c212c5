"""What a rank does in a round: k local steps on batches of its own shards. It communicates only where the
step does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hvd_train.algorithm.header import StepDone, Work
from hvd_train.algorithm.pace import Pace
from hvd_train.algorithm.period.base import Seconds
from hvd_train.algorithm.transformed_reader import TransformedReader
from hvd_train.config.data import LastBatch
from hvd_train.data.batches import next_batch, num_batches
from hvd_train.data.remainder import Leg
from hvd_train.errors import DataError
from hvd_train.io.stateful import Count, State, checked
from hvd_train.liveness import phase
from hvd_train.tasks.base import Batch

Step = Callable[[Sequence[Batch]], StepDone]
"""One optimizer step on some batches. Without any it does what a rank that is out of rows does."""


class SavedWorker(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a `Worker` as a checkpoint holds it."""

    epochs: Count
    reader: dict[str, Any]
    rows: Count | None = None
    steps: Count = 0
    """In place of `rows`, of version 0.1.0."""
    legs: tuple[Leg, ...] = ()
    """The legs of the epoch before the present one."""
    own_epochs: bool = False


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
        batch_size: samples of a batch; of all ranks together where they share it.
        accumulate: batches of a local step.
        last_batch: what becomes of rows that are no full batch.
        samples_per_rank: rows of every rank's part; the one with most rows counts the epochs.
        own_epochs: whether a rank that is through its own rows begins its next epoch, whatever the others do.
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
        own_epochs: bool = False,
    ) -> None:
        self._reader = reader
        self._step = step
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._last_batch: LastBatch = last_batch
        self.own_epochs = own_epochs
        """Whether this rank passes epochs of its own."""
        self._most_rows = reader.num_samples if own_epochs else max(samples_per_rank)
        self._pace = Pace()
        self.epochs = 0
        """Full epochs done; without epochs of its own the same on all ranks."""
        self._legs: tuple[Leg, ...] = ()
        """The legs of this epoch before the present one; none but in an epoch that was interrupted."""
        self._done = 0.0
        """The part of the epoch's rows that those have taken."""
        self._epoch_rows = self._most_rows
        """Rows of this leg on the rank with most rows."""
        self._rows = 0
        """Rows that the steps of this leg have taken so far on the rank with most rows."""
        self.restarted = False
        """Whether the loaded state does not fit the present rows of this rank, so that its epoch must begin
        anew. Then the epoch of every rank must, or the ranks would not pass to the next at the same step."""
        self._began = reader.state_dict()
        """The state of the reader before the last round."""
        self.left_out: dict[str, int] = {}
        """Rows of this epoch that were drawn and not used since this start, by reason."""
        self.left_out_before: dict[str, int] = {}
        """The same of the epoch before."""
        self._left_out_in_round: dict[str, int] = {}

    @property
    def progress(self) -> float:
        """Epochs done, with the part of the current one."""
        steps = steps_per_epoch([self._epoch_rows], self._batch_size, self._accumulate, self._last_batch)
        if not steps:
            return float(self.epochs)  # of a rank without rows
        return self.epochs + self._done + (1 - self._done) * (steps - self._steps_left()) / steps

    def run(self, limit: int | Seconds) -> Work:
        """Local steps up to the limit of the round. A rank that is out of rows has no batches in the rest of
        the epoch; one that has none, and epochs of its own, takes no step. Collective where the step is."""
        self._pace.begin(limit if self._most_rows else 0)
        self._began = self._reader.state_dict()
        self._left_out_in_round = {}
        samples, loss_sum = 0, 0.0
        data_s = compute_s = communication_s = 0.0
        mark = time.perf_counter()
        while not self._pace.is_over():
            batches = self._draw()
            drawn = time.perf_counter()
            phase("local step")
            step = self._step(batches)
            samples += step.samples
            loss_sum += step.loss_sum
            self._count_step()
            done = time.perf_counter()
            data_s += drawn - mark
            compute_s += done - drawn - step.communication_s
            communication_s += step.communication_s
            mark = done
            self._pace.count()
        return Work(
            samples=samples,
            loss_sum=loss_sum,
            data_s=data_s,
            compute_s=compute_s,
            communication_s=communication_s,
            left_out=self._left_out_in_round,
            steps=self._pace.steps,
            epoch=self.progress,
        )

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
            drawn = self._reader.next_batch()
            if drawn is None:
                break
            for counts in (self.left_out, self._left_out_in_round):
                for reason, rows in drawn.left_out.items():
                    counts[reason] = counts.get(reason, 0) + rows
            if drawn.batch is not None:
                batches.append(drawn.batch)
        return batches

    def _steps_left(self) -> int:
        """Steps until the epoch ends. Counted from its rows, as a resumed run may have other batches."""
        left = self._epoch_rows - self._rows
        batches = num_batches(left, self._batch_size, self._last_batch, taken=self._rows)
        return -(-batches // self._accumulate)

    def _next_batch(self, left: int, taken: int) -> int:
        return next_batch(left, self._batch_size, self._last_batch, taken=taken)

    def _rows_of_step(self) -> int:
        """Rows that the next step takes on the rank with most rows."""
        left = self._epoch_rows - self._rows
        taken = 0
        for _ in range(self._accumulate):
            taken += self._next_batch(left - taken, self._rows + taken)
        return taken

    def _count_step(self) -> None:
        self._rows += self._rows_of_step()
        if self._steps_left() == 0:
            self.left_out_before = self.left_out
            self.epochs += 1
            self.restart_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The position of this rank in its data."""
        state = {"epochs": self.epochs, "rows": self._rows, "reader": self._reader.state_dict()}
        if self.own_epochs:
            return {**state, "own_epochs": True}
        # Older programs read the state of an epoch that was not dealt anew.
        return {**state, "legs": list(map(msgspec.to_builtins, self._legs))} if self._legs else state

    def load_state_dict(self, state: State) -> None:
        """Continues from there, with the rows that are left in the epoch; see `restarted`."""
        saved = checked(state, SavedWorker)
        # Older checkpoints count steps; the reader's position shows whether those had such batches.
        rows = saved.steps * self._batch_size * self._accumulate if saved.rows is None else saved.rows
        self._reader.load_state_dict(saved.reader)
        self.epochs, self._rows = saved.epochs, rows
        # That many rows, if this rank had them; at its end it may have taken more at once, or dropped some.
        position, mine = saved.reader["position"], self._reader.num_samples
        fits = saved.rows is not None or position == min(rows, mine) or position == mine == rows + 1
        fits = fits and saved.own_epochs == self.own_epochs
        self.restarted = self._reader.restarted or not fits or rows >= max(1, self._epoch_rows)

    def restart_epoch(self) -> None:
        """Goes to the beginning of the current epoch."""
        self._legs, self._done, self._epoch_rows, self._rows = (), 0.0, self._most_rows, 0
        self.left_out = {}
        self._reader.start_epoch(self.epochs)

    def take_up(self, legs: Sequence[Leg], done: float, samples_per_rank: Sequence[int]) -> None:
        """Begins a further leg of the current epoch. The reader is at its start already.

        Args:
            legs: those before it.
            done: the part of the epoch's rows that those have taken.
            samples_per_rank: rows of every rank's part of this leg.
        """
        self._legs, self._done, self._epoch_rows, self._rows = tuple(legs), done, max(samples_per_rank), 0

    def close(self) -> None:
        """Closes the shards."""
        self._reader.close()
