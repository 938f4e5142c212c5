"""What a resumed run takes over from the checkpoints on disk: `best`, `latest` and watch then agree."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path
from typing import Protocol

from hvd_train.run.checkpoint import Checkpoints, put
from hvd_train.run.saved_checkpoint import SavedCheckpoint, what_is_wrong


class ErrorCurve(Protocol):
    """The part of the watch that holds the errors of a training."""

    curve: list[tuple[int, float]]
    """(round, value of the metric) of every evaluation so far."""
    best: float | None
    best_round: int

    def best_of(self, rounds: Container[int]) -> int | None:
        """Which of some rounds had the best value; None if none of them was evaluated."""
        ...

    def take_best(self, rounds: int | None) -> None:
        """Makes the value after `rounds` rounds the best; with None the next evaluation is the best."""
        ...


def carry_over(checkpoints: Checkpoints, watch: ErrorCurve, saved: SavedCheckpoint) -> str:
    """After `watch` was restored from `saved`: lets `best` name the best model that the watch knows of. A run
    under a new name gets copies of that and of `saved`, as its `latest`. Collective.

    Where the best model is lost (it could not be saved, or was damaged or removed) the watch takes the best
    of those that are whole; returns a message then. Raises `RunDirectoryError`, on every rank, where rank 0
    cannot write the folder.
    """
    comm = checkpoints.comm
    rounds = checkpoints.together(lambda: _act(checkpoints, watch, saved) if comm.rank == 0 else None)
    rounds = comm.broadcast(rounds)
    lost, lost_round = watch.best, watch.best_round
    if lost is None or rounds == lost_round:
        return ""
    watch.take_best(rounds)
    now = "none" if rounds is None else f"{watch.best:.6g} of round {rounds}"
    return (
        f"the best model, {lost:.6g} of round {lost_round}, is not on disk, or not whole. The best from now "
        f"on is {now}."
    )


def _act(checkpoints: Checkpoints, watch: ErrorCurve, saved: SavedCheckpoint) -> int | None:
    """Rank 0's part. Returns the round of the best model; None if there is none."""
    beside = saved.folder.parent
    if beside.resolve() != checkpoints.folder.resolve():
        _copy(checkpoints, saved.folder, saved.round)
        checkpoints.name(saved.round, {"latest"})
    if watch.best is None:
        if beside.resolve() == checkpoints.folder.resolve():
            checkpoints.name(None, {"best"})  # it was best by another metric
        return None

    def checkpoint(rounds: int) -> Path:
        return saved.folder if rounds == saved.round else beside / f"round-{rounds}"

    def is_whole(rounds: int) -> bool:
        return rounds == saved.round or (
            checkpoint(rounds).is_dir() and not what_is_wrong(checkpoint(rounds))
        )

    best: int | None = watch.best_round
    if not is_whole(watch.best_round):
        best = watch.best_of({rounds for rounds, _ in watch.curve if is_whole(rounds)})
    if best is not None:
        _copy(checkpoints, checkpoint(best), best)
    checkpoints.name(best, {"best"})
    return best


def _copy(checkpoints: Checkpoints, checkpoint: Path, rounds: int) -> None:
    to = checkpoints.folder / f"round-{rounds}"
    if checkpoint.resolve() == to.resolve():
        return
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint, temporary)
    checkpoints.claim.check()
    put(temporary, to)
