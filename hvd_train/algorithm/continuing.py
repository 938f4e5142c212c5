"""An interrupted epoch goes on with the rows that it has left, with other ranks or in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hvd_train.algorithm.worker import SavedWorker, Worker
from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.data.bits import Bits
from hvd_train.data.catalog import Catalog
from hvd_train.data.format import FieldSpec
from hvd_train.data.readers.cursor import SavedReader
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.remainder import Leg, Part, Remainder, first_parts, join, undone
from hvd_train.data.screen import Screen
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import State, checked
from hvd_train.run.saved_checkpoint import SavedCheckpoint, rank_file


@dataclass(frozen=True, kw_only=True)
class EpochResume:
    """Lets the ranks go on in the epoch in which a checkpoint was written."""

    comm: Communicator
    worker: Worker
    reader: EpochReader
    """Of the worker."""
    catalog: Catalog
    screen: Screen | None
    """Marks the rows that are left out."""
    parts: int
    """In how many parts the rows are dealt: the ranks, or 1 if they share every batch."""

    def go_on(self, saved: SavedCheckpoint, before: Mapping[str, Any], epochs: int) -> str:
        """Where a rank's rows are not those of its state, deals the rows that the epoch has left; returns
        what the user should know of that. Collective.

        Args:
            saved: the checkpoint that the worker was restored from.
            before: the configuration that it was written with; empty if that is not known.
            epochs: full epochs that the run had done. With epochs of their own, ranks may have done others.
        """
        if not any(self.comm.allgather(self.worker.restarted)):
            return ""
        states = self._states(saved)
        found = together(self.comm, lambda: [_checked(saved, *item) for item in enumerate(states)])
        workers, readers = [worker for worker, _ in found], [reader for _, reader in found]
        legs, left = workers[0].legs, None
        if legs:
            left = self._left(legs)
            if left is not None and self._goes_on_in(left, legs, states):
                return ""
        now = None if self.worker.own_epochs else _leg(workers, readers, before)
        if now is not None and (left is not None or not legs):
            if not legs and not any(now.positions.values()):
                self.worker.restart_epoch()
                return ""  # nothing was read of it
            legs, left = (*legs, now), self._left([now], left)
        why = (
            "the rows of the ranks, or their order, are not those of the checkpoint (other data, number of "
            f"ranks, batch size, seed, reading or order): epoch {epochs + 1} "
        )
        if workers[0].own_epochs is not self.worker.own_epochs:
            why = (
                "with sync.schedule = 'time' every rank passes epochs of its own, with the others all ranks "
                f"pass them together: epoch {epochs + 1} "
            )
        if now is None or left is None or not left.num_rows:
            self.reader.drop()
            self.worker.epochs = epochs
            self.worker.restart_epoch()
            return why + "begins anew."
        self._take_up(left, legs)
        return why + f"goes on with the {left.num_rows:,} rows that it has left."

    def _states(self, saved: SavedCheckpoint) -> list[State]:
        """Of the workers of all ranks that wrote the checkpoint."""
        comm = self.comm
        ranks = range(comm.rank, saved.world_size, comm.size)
        mine = together(comm, lambda: {rank: saved.part(rank, "worker") for rank in ranks})
        every = {rank: state for states in comm.allgather(mine) for rank, state in states.items()}
        return [every[rank] for rank in range(saved.world_size)]

    def _left(self, legs: Sequence[Leg], left: Remainder | None = None) -> Remainder | None:
        """What further legs leave of an epoch (default: of a whole one); None if the data or the deal are not
        those of the legs. Each rank draws the order of some of the parts again."""
        comm, epoch = self.comm, self.worker.epochs
        for leg in legs:
            parts = _parts(left, self.catalog, leg)
            mine = partial(
                _undone, parts, range(comm.rank, leg.parts, comm.size), leg, epoch, self.catalog.sample.fields
            )
            every = {i: bits for theirs in comm.allgather(together(comm, mine)) for i, bits in theirs.items()}
            found = {index: bits for index, bits in every.items() if bits is not None}
            if len(found) < len(every):
                return None
            left = join(self.catalog.train, parts, found)
        return left

    def _goes_on_in(self, left: Remainder, legs: Sequence[Leg], states: Sequence[State]) -> bool:
        """Whether the ranks could go to where they were in the last leg."""
        self._take_up(left, legs)
        self.worker.load_state_dict(states[self.comm.rank % len(states)])
        return not any(self.comm.allgather(self.worker.restarted))

    def _take_up(self, left: Remainder, legs: Sequence[Leg]) -> None:
        part = left.part(self.comm.rank % self.parts, self.parts)
        self.reader.take_up(self.worker.epochs, part.rows(self.catalog.sample.fields, self.screen))
        done = 1 - left.num_rows / sum(span.num_rows for span in self.catalog.train)
        self.worker.take_up(legs, done, [left.most_rows(self.parts)])


def _checked(saved: SavedCheckpoint, rank: int, state: State) -> tuple[SavedWorker, SavedReader]:
    try:
        worker = checked(state, SavedWorker)
        return worker, checked(worker.reader, SavedReader)
    except RunDirectoryError as error:
        raise saved.refusal(f"{rank_file(rank)}: the state of worker: {str(error).rstrip('.')}") from None


def _leg(
    workers: Sequence[SavedWorker], readers: Sequence[SavedReader], before: Mapping[str, Any]
) -> Leg | None:
    """The leg that was interrupted; None if it is not known, or the ranks were not in the same one."""
    if (
        not before
        or any(w.own_epochs for w in workers)
        or any((w.epochs, w.legs) != (workers[0].epochs, workers[0].legs) for w in workers)
    ):
        return None
    return Leg(
        parts=1 if before["data.order"] == "global" else len(workers),
        seed=before["seed"],
        batch_size=before["data.batch_size"],
        positions={reader.fingerprint: reader.position for reader in readers},
    )


def _parts(left: Remainder | None, catalog: Catalog, leg: Leg) -> list[Part]:
    if left is None:
        return first_parts(catalog.train, catalog.parts(leg.parts, leg.batch_size))
    return [left.part(index, leg.parts) for index in range(leg.parts)]


def _undone(
    parts: Sequence[Part], indices: Sequence[int], leg: Leg, epoch: int, fields: Mapping[str, FieldSpec]
) -> dict[int, Bits | None]:
    """What the leg did not read of these parts; None for a part that it does not know."""
    return {index: undone(parts[index], leg, epoch, fields) for index in indices}
