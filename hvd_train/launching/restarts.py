"""`hvd_train restarts`: whether another start of a run is worth it. Imports neither torch nor MPI.

A job script asks before it puts its job into the queue once more, and before it starts one that the queue
gave back to it. Only the run's own events.jsonl counts: a start that writes no checkpoint of a later round
than the one that it resumed from was without progress.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from hvd_train.config import Config
from hvd_train.config_values import require_usable
from hvd_train.errors import ConfigError
from hvd_train.record.events import read_events
from hvd_train.run.layout import EVENTS_FILE, folder_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decide whether to start a run again: exit code 0 if so, 1 if not, and a line with the reason.

    The options of the training, which name the run, follow `--`:
    `restarts --limit 3 -- --name long`."""

    limit: Annotated[int, arg(metavar="N")] = 3
    """Give up after this many consecutive starts without a new checkpoint."""

    begun: bool = False
    """Print the number of starts that reached their first step, and exit."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        if self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: expected 1 or more.")


def parse(args: Sequence[str]) -> Options:
    """Raises `ConfigError`; exits with code 2 for an option that does not exist."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, prog="hvd_train restarts", args=list(args), config=config)


@dataclass(frozen=True)
class StartsSoFar:
    """How far a run has come."""

    round: int
    """Rounds that the next start will find done."""

    starts: int
    """Starts that reached their first step."""

    without_progress: int
    """The number of last starts that have not gone beyond this round; 1 is not conclusive yet."""

    diverged: bool = False
    """Whether the last start ended because the training diverged: the next one would resume from there."""


def progress(events: Iterable[Mapping[str, Any]]) -> StartsSoFar:
    """How far the run with these events has come."""
    starts: list[int] = []
    reached, diverged = 0, False
    for event in events:
        if event["event"] == "header":
            starts.append(event["round"])
            reached, diverged = event["round"], False
        elif event["event"] == "checkpoint":
            reached = max(reached, event["round"])  # that of the best may be written late
        elif event["event"] == "stop":
            diverged = event["reason"] == "diverged"
    without_progress = 0
    while without_progress < len(starts) and starts[-1 - without_progress] >= reached:
        without_progress += 1
    return StartsSoFar(reached, len(starts), without_progress, diverged)


def main(options: Options, training: Config) -> int:
    """Prints whether another start is worth it; returns the exit code."""
    folder, _ = folder_of(replace(training, resume=training.resume or "auto"))
    file = folder / EVENTS_FILE
    found = progress(read_events(file)) if os.path.exists(file) else StartsSoFar(0, 0, 0)
    if options.begun:
        print(found.starts, flush=True)
        return 0
    if found.diverged:
        print(
            f"{folder}: the training diverged; expected a run that was interrupted. Start it anew with a "
            "smaller --lr.",
            flush=True,
        )
        return 1
    if found.without_progress < options.limit:
        print(f"{folder}: another start goes on from round {found.round}", flush=True)
        return 0
    print(
        f"{folder}: {found.without_progress} starts in a row resumed from round {found.round} and wrote no "
        f"later checkpoint; expected fewer than {options.limit}. Find out what ended them, or lower "
        "checkpoint.every_rounds.",
        flush=True,
    )
    return 1
