"""Rows that are left out of batches, because of what they hold: how many, and what a user is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from hvd_train.algorithm.header import Header
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.worker import Worker
from hvd_train.comm.base import Communicator
from hvd_train.data.damage import Damage
from hvd_train.data.screen import REASONS, Screen
from hvd_train.errors import DataError
from hvd_train.io.text import counted, listed
from hvd_train.record.reports import FaultReport, Recorder
from hvd_train.record.wording import LEFT_OUT

_OF_ROWS = ("not_finite", "damaged")
"""The reasons that are the same in every epoch. Which rows are alone depends on the batches."""


@final
class LeftOut:
    """Counts the rows that were left out, and reports them: those of the first epoch at its end, and those of
    a later one if its numbers differ. The same on every rank; it communicates only after such a row. Where
    ranks pass epochs of their own, the numbers of an epoch are those of the newest one that each has done.

    Args:
        screen: what marks this rank's rows for training; None: none are left out.
    """

    def __init__(
        self,
        comm: Communicator,
        worker: Worker,
        progress: Progress,
        screen: Screen | None,
        recorder: Recorder,
        num_rows: int,
    ) -> None:
        self._comm = comm
        self._worker = worker
        self._progress = progress
        self._screen = screen
        self._recorder = recorder
        self._num_rows = num_rows
        self._epochs = progress.epochs
        self._reported: dict[str, list[int]] = {}
        self._evaluation_reported = 0
        self.totals = dict.fromkeys(REASONS, 0)
        """Since this start, by reason; a row counts in every epoch."""

    def after_round(self, header: Header, rounds: int) -> None:
        """Takes the numbers of a round. Collective. Raises `DataError`, on every rank, after an epoch in
        which no row was used."""
        for reason in REASONS:
            self.totals[reason] += int(header[f"{reason}_rows"].sum())
        if header["damaged_rows"].any():
            self._report_damage(rounds, new_files=True)
        if self._progress.epochs == self._epochs:
            return
        self._epochs = self._progress.epochs
        if not any(self.totals.values()):
            return
        if self.totals["damaged"]:
            self._report_damage(rounds, new_files=False)
        counts = self._gather(self._worker.left_out_before)
        if any(counts[reason] != self._reported.get(reason) for reason in _OF_ROWS):
            self._report(counts, f"epoch {self._epochs}", rounds)
        if sum(map(sum, counts.values())) >= self._num_rows:
            raise DataError(
                f"each of the {self._num_rows:,} training rows was left out; expected at least 1 that can be "
                "used. Look at the data with `hvd_train shard info`.",
                agreed=True,
            )

    def after_evaluation(self, left_out: int, first: str, num_samples: int, rounds: int) -> None:
        """Reports, where that has changed, how many rows an evaluation left out. Collective.

        Args:
            left_out: of `num_samples`; the same on every rank.
            first: where the first of them was that this rank read.
        """
        if left_out == self._evaluation_reported:
            return
        self._evaluation_reported = left_out
        places = [place for place in self._comm.allgather(first) if place]
        self._fault(
            f"{left_out:,} of {counted(num_samples, 'validation row')} are left out of every evaluation: "
            f"they {LEFT_OUT['not_finite']}{_first(places)}.",
            rounds,
        )

    def finish(self, rounds: int) -> None:
        """Reports what was not reported yet: damage, and rows of an epoch that has not ended. Collective."""
        if self.totals["damaged"]:
            self._report_damage(rounds, new_files=False)
        if any(self.totals.values()) and not self._reported:
            self._report(self._gather(self._worker.left_out), f"epoch {self._epochs + 1}, so far", rounds)

    def _report_damage(self, rounds: int, *, new_files: bool) -> None:
        """One report for each file."""
        mine = self._screen.unreported_damage(new_files=new_files) if self._screen else []
        files: dict[str, Damage] = {}
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(self._comm.allgather(mine)):
            for damage in found:
                files[damage.path] = files.get(damage.path, damage).joined(damage.ranges)
                ranks.setdefault(damage.path, []).append(rank)
        for path, damage in files.items():
            self._recorder.report(
                FaultReport(round=rounds, kind="damaged_rows", ranks=tuple(ranks[path]), message=str(damage))
            )

    def _gather(self, mine: dict[str, int]) -> dict[str, list[int]]:
        """For each reason the rows of each rank."""
        table = self._comm.gather_values([mine.get(reason, 0) for reason in REASONS])
        return {reason: table[:, i].astype(int).tolist() for i, reason in enumerate(REASONS)}

    def _report(self, counts: dict[str, list[int]], when: str, rounds: int) -> None:
        self._reported = counts
        first = self._screen.first_not_finite if self._screen else ""
        places = [place for place in self._comm.allgather(first) if place]
        parts = [
            f"{sum(rows):,} as they {LEFT_OUT[reason]} ({_by_rank(rows)})"
            for reason, rows in counts.items()
            if any(rows)
        ]
        message = (
            f"{when}: of {counted(self._num_rows, 'training row')} there are left out "
            f"{' and '.join(parts) or 'none'}{_first(places) if parts else ''}."
        )
        self._fault(message, rounds, counts)

    def _fault(self, message: str, rounds: int, rows: dict[str, list[int]] | None = None) -> None:
        by_rank = np.sum([*(rows or {}).values()], axis=0, dtype=int) if rows else np.zeros(0)
        self._recorder.report(
            FaultReport(
                round=rounds,
                kind="rows_left_out",
                ranks=tuple(map(int, np.flatnonzero(by_rank))),
                message=message,
                rows=rows or {},
            )
        )


def _first(places: Sequence[str]) -> str:
    return f"; the first is {places[0]}" if places else ""


def _by_rank(rows: Sequence[int]) -> str:
    return listed([f"rank {rank}: {n:,}" for rank, n in enumerate(rows) if n])
