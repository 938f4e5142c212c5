"""Whether a run is running, and how it ended, by its log and the claim to its folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd_train.monitor.history import History
from hvd_train.record.wording import duration
from hvd_train.run.claim import BEAT_S, STALE_S, Seen, last_claim
from hvd_train.run.holder import Holder

Name = Literal["starting", "running", "finished", "interrupted", "diverged", "crashed", "empty", "unknown"]
_ENDS: dict[str, Name] = {"interrupted": "interrupted", "diverged": "diverged"}
"""The state after a `stop` with these reasons; after any other the run has finished."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run."""

    name: Name
    detail: str = ""
    """In words: why it ended, or what shows that it crashed."""

    @property
    def is_live(self) -> bool:
        """Whether a job works on it."""
        return self.name in ("starting", "running")


def state_by(folder: Path, history: History) -> State:
    """The state of the run in `folder`, of whose log `history` was read."""
    stop = history.stop
    return state_of(
        folder,
        recorded=history.last is not None,
        reason=stop.reason if stop else None,
        stopped_s=stop.time_s if stop else 0.0,
    )


def state_of(
    folder: Path,
    *,
    recorded: bool,
    reason: str | None = None,
    stopped_s: float = 0.0,
    now: float | None = None,
) -> State:
    """The state of the run in `folder`.

    Args:
        recorded: whether its log has any event.
        reason: why it stopped, if the log ends with that.
        stopped_s: when it stopped, in Unix seconds.
        now: Unix seconds, by default of this host's clock.
    """
    try:
        seen = last_claim(folder)
    except OSError as error:
        return State(name="unknown", detail=f"its folder cannot be read: {error.strerror}")
    now = time.time() if now is None else now
    holds, why = _holder(seen, now) if seen else (False, "")
    if reason is not None:
        # The job that stopped renews its claim for some seconds more; later renewals are those of the next.
        if holds and seen and seen.changed_ns / 1e9 > stopped_s + 3 * BEAT_S:
            return State(name="starting", detail=why)
        return State(name=_ENDS.get(reason, "finished"), detail=reason)
    if holds:
        return State(name="running" if recorded else "starting", detail=why)
    if not recorded and not why:
        return State(name="empty", detail="there is no event in its log")
    return State(name="crashed", detail=why or "its log has no `stop`, and no job holds its folder")


def _holder(seen: Seen, now: float) -> tuple[bool, str]:
    """Whether a job holds the folder, and what is known of that job."""
    holder = seen.holder
    if holder is not None and holder.released:
        return False, f"{holder} ended without a `stop` in the log"
    lives = None if holder is None else holder.lives(Holder.this_process(os.environ))
    if lives is not None:
        return lives, str(holder) if lives else f"{holder} was killed"
    # On another host. Its clock, and the file server's, may differ from this one's by some seconds.
    silent_s = now - seen.changed_ns / 1e9
    who = holder or "an unknown job"
    if silent_s < STALE_S:
        return True, str(who)
    return False, f"{who} has given no sign of life for {duration(silent_s)}"
