"""The local steps of each round of another run, from its event log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hvd_train.errors import ConfigError
from hvd_train.record.events import read_events
from hvd_train.run.layout import EVENTS_FILE, run_of

Stretch = tuple[int, int | tuple[int, ...]]
"""The last one of some rounds, and the k of each of them: one number for all ranks, or one for each."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
_Steps = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Start(msgspec.Struct):
    """What is read of a `header`."""

    round: _Steps
    period: _Count | None


class _Rounds(msgspec.Struct):
    """What is read of a `round`."""

    rounds: tuple[_Count, _Count]
    period: _Count
    periods: list[tuple[_Count, _Count]] = []
    steps: list[tuple[_Steps, ...]] = []

    def lengths(self) -> list[tuple[int | tuple[int, ...], int]]:
        """k, and for how many rounds."""
        if self.steps:
            return [(steps, 1) for steps in self.steps]
        return [*self.periods] or [(self.period, self.rounds[1] - self.rounds[0] + 1)]


def periods_of(run: str, world_size: int) -> tuple[Stretch, ...]:
    """The periods of a run: stretches of rounds with one k, from round 1 on. Rounds that a resume has undone
    are left out.

    Args:
        world_size: ranks that are to repeat it.

    Raises `ConfigError` if `run` is not the folder of a run, its log does not have every round, or its ranks
    took numbers of local steps of their own and were not as many.
    """
    file = run_of(Path(run)) / EVENTS_FILE
    if not file.is_file():
        raise ConfigError(f"sync.replay_periods = {run!r}: there is no {file}; expected the folder of a run.")
    stretches: list[Stretch] = []
    try:
        for event in read_events(file):
            _take(event, stretches, file)
    except (OSError, ValueError) as error:  # msgspec's are ValueErrors
        raise ConfigError(
            f"sync.replay_periods: {file}: cannot be read: {error}. Give a run whose log is whole."
        ) from None
    if not stretches:
        raise ConfigError(
            f"sync.replay_periods: {file} has no round; expected a run that has averaged at least once."
        )
    _check_ranks(stretches, world_size, file)
    return tuple(stretches)


def _take(event: Mapping[str, Any], stretches: list[Stretch], file: Path) -> None:
    if event.get("event") == "header":
        start = msgspec.convert(event, _Start)
        if start.period is None:
            raise ConfigError(
                f"sync.replay_periods: {file} is of a run with sync.mode = 'none', which was never averaged. "
                "Give one that was."
            )
        _undo(stretches, start.round)
    elif event.get("event") == "round":
        line = msgspec.convert(event, _Rounds)
        (first, last), done = line.rounds, stretches[-1][0] if stretches else 0
        lengths = line.lengths()
        if first != done + 1 or sum(rounds for _, rounds in lengths) != last - first + 1:
            raise ConfigError(
                f"sync.replay_periods: {file} goes from round {done} to a line of rounds {first} to {last}; "
                "expected every round from 1 on. Give a run whose log is whole and begins with its first "
                "round."
            )
        for k, rounds in lengths:
            done += rounds
            if stretches and stretches[-1][1] == k:
                stretches.pop()
            stretches.append((done, k))


def _undo(stretches: list[Stretch], rounds: int) -> None:
    """Leaves out what came after `rounds` rounds."""
    last = None
    while stretches and stretches[-1][0] > rounds:
        last = stretches.pop()
    if last is not None and (stretches[-1][0] if stretches else 0) < rounds:
        stretches.append((rounds, last[1]))


def _check_ranks(stretches: list[Stretch], world_size: int, file: Path) -> None:
    """Raises `ConfigError` unless each round has one k for all ranks, or each one for every rank."""
    sizes = {len(k) if isinstance(k, tuple) else 0 for _, k in stretches}
    if sizes - {0, world_size}:
        (other, *_) = sorted(sizes - {0, world_size})
        raise ConfigError(
            f"sync.replay_periods: {file} has the local steps of each of {other} ranks (sync.schedule = "
            f"'time'); expected {world_size}, the ranks of this job. Start as many ranks."
        )
    if len(sizes) > 1:
        raise ConfigError(
            f"sync.replay_periods: {file} is of a run that changed from or to sync.schedule = 'time', where "
            "every rank passes epochs of its own; expected one or the other in all rounds."
        )
