"""The local steps of each round of another run, from its event log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hvd_train.errors import ConfigError
from hvd_train.record.events import read_events
from hvd_train.run.layout import EVENTS_FILE, run_of

_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class _Start(msgspec.Struct):
    """What is read of a `header`."""

    round: Annotated[int, msgspec.Meta(ge=0)]
    period: _Count | None


class _Rounds(msgspec.Struct):
    """What is read of a `round`."""

    rounds: tuple[_Count, _Count]
    period: _Count
    periods: list[tuple[_Count, _Count]] = []


def periods_of(run: str) -> tuple[tuple[int, int], ...]:
    """The periods of a run: (last round, k) of stretches of rounds with one k, from round 1 on. Rounds that a
    resume has undone are left out.

    Raises `ConfigError` if `run` is not the folder of a run, or its log does not have every round.
    """
    file = run_of(Path(run)) / EVENTS_FILE
    if not file.is_file():
        raise ConfigError(f"sync.replay_periods = {run!r}: there is no {file}; expected the folder of a run.")
    stretches: list[tuple[int, int]] = []
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
    return tuple(stretches)


def _take(event: Mapping[str, Any], stretches: list[tuple[int, int]], file: Path) -> None:
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
        steps = line.periods or [(line.period, last - first + 1)]
        if first != done + 1 or sum(rounds for _, rounds in steps) != last - first + 1:
            raise ConfigError(
                f"sync.replay_periods: {file} goes from round {done} to a line of rounds {first} to {last}; "
                "expected every round from 1 on. Give a run whose log is whole and begins with its first "
                "round."
            )
        for k, rounds in steps:
            done += rounds
            if stretches and stretches[-1][1] == k:
                stretches.pop()
            stretches.append((done, k))


def _undo(stretches: list[tuple[int, int]], rounds: int) -> None:
    """Leaves out what came after `rounds` rounds."""
    last = None
    while stretches and stretches[-1][0] > rounds:
        last = stretches.pop()
    if last is not None and (stretches[-1][0] if stretches else 0) < rounds:
        stretches.append((rounds, last[1]))
