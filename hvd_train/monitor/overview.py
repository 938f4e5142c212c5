"""A folder of runs at a glance: of each log only the first line and the end are read."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvd_train.io.regular import open_regular
from hvd_train.monitor.events import UNREADABLE, Evaluation, Event, Round, Start, Stop, decode
from hvd_train.monitor.follow import MAX_LINE_BYTES
from hvd_train.monitor.state import State, state_of
from hvd_train.run.layout import CONFIG_FILE, EVENTS_FILE

_BLOCK_BYTES = 1 << 16
_END_BYTES = 1 << 20
"""How far back the end of a log is read."""
_HEADER = b'\n{"event":"header"'
_SPEED_OVER_S = 10.0
"""The speed of a live run is that of its rounds of so many seconds."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One run."""

    name: str
    folder: Path
    state: State
    round: int | None = None
    metric: str = ""
    best: float | None = None
    last: float | None = None
    """Of the metric, its last value."""
    samples_per_s: float | None = None
    ranks: int | None = None
    hosts: int | None = None
    event_s: float | None = None
    """When the last event was recorded, in Unix seconds."""
    problem: str = ""
    """Why some of this is not known."""


def runs_in(folder: Path) -> list[Path]:
    """The folders of runs in `folder`, by name. Raises OSError."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if _is_folder(entry) and is_run(entry.path)]
    return sorted(found)


def is_run(folder: str | Path) -> bool:
    """Whether a folder has a run's log or configuration."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (EVENTS_FILE, CONFIG_FILE))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def overview(folder: Path, now: float | None = None) -> Overview:
    """What a run is doing, or how it ended. Never raises: what cannot be read is its `problem`."""
    log = folder / EVENTS_FILE
    try:
        start, events = _first(log), _Newest(log)
    except FileNotFoundError:
        return Overview(name=folder.name, folder=folder, state=state_of(folder, recorded=False, now=now))
    except OSError as error:
        state = state_of(folder, recorded=True, now=now)
        problem = f"its log cannot be read: {error.strerror}"
        return Overview(name=folder.name, folder=folder, state=state, problem=problem)
    start = events.start or start
    stop, last = events.stop, events.evaluation
    state = state_of(
        folder,
        recorded=events.last is not None,
        reason=stop.reason if stop else None,
        stopped_s=stop.time_s if stop else 0.0,
        now=now,
    )
    if start is None:
        if events.last or events.damaged:
            problem = "its log does not begin with a header"
        else:
            problem = "its log has no complete line" if events.num_bytes else ""
        return Overview(name=folder.name, folder=folder, state=state, problem=problem)
    return Overview(
        name=folder.name,
        folder=folder,
        state=state,
        round=events.last.round if events.last else 0,
        metric=start.metric,
        best=stop.best if stop else last.best if last else None,
        last=stop.final if stop else last.error if last else None,
        samples_per_s=events.samples_per_s(),
        ranks=start.world_size,
        hosts=len(start.hosts),
        event_s=events.last.time_s if events.last else None,
        problem="lines of its log cannot be read" if events.damaged else "",
    )


def _first(log: Path) -> Start | None:
    """The header in the first line."""
    with io.BufferedReader(open_regular(log)) as file:
        line = file.readline(MAX_LINE_BYTES)
    try:
        event = decode(line)
    except UNREADABLE:
        return None
    return event if isinstance(event, Start) else None


class _Newest:
    """The newest events of each kind, from the end of a log."""

    def __init__(self, log: Path) -> None:
        self.last: Event | None = None
        self.start: Start | None = None
        """Unless it is further away."""
        self.stop: Stop | None = None
        self.evaluation: Evaluation | None = None
        self.damaged = 0
        self.num_bytes = os.stat(log).st_size
        self._rounds: list[Round] = []
        for line in _backwards(log):
            try:
                event = decode(line)
            except UNREADABLE:
                self.damaged += 1
                continue
            if self._add(event):
                break
        self.start = self.start or _last_start(log)

    def _add(self, event: Event) -> bool:
        """Takes the next older event; returns whether nothing more is needed."""
        self.last = self.last or event
        if isinstance(event, Start):
            self.start = event
        elif isinstance(event, Stop):
            self.stop = self.stop or event
        elif isinstance(event, Evaluation):
            self.evaluation = self.evaluation or event
        elif isinstance(event, Round) and not self._enough_rounds():
            self._rounds.append(event)
        done = self.stop is not None or (self.evaluation is not None and self._enough_rounds())
        return self.start is not None or done

    def _enough_rounds(self) -> bool:
        return len(self._rounds) > 1 and self._rounds[0].time_s - self._rounds[-1].time_s >= _SPEED_OVER_S

    def samples_per_s(self) -> float | None:
        """Of the whole training if it stopped, else of its last rounds."""
        if self.stop is not None:
            return self.stop.samples / self.stop.seconds if self.stop.seconds > 0 else None
        if len(self._rounds) < 2:
            return None
        seconds = self._rounds[0].time_s - self._rounds[-1].time_s
        return sum(r.samples for r in self._rounds[:-1]) / seconds if seconds > 0 else None


def _last_start(log: Path) -> Start | None:
    """The newest header in the end of a log: the first line is not that of the last start."""
    with open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
        end = file.read(_END_BYTES)
    at = end.rfind(_HEADER)
    if at < 0:
        return None
    try:
        event = decode(end[at + 1 :].partition(b"\n")[0])
    except UNREADABLE:
        return None
    return event if isinstance(event, Start) else None


def _backwards(log: Path) -> Iterator[bytes]:
    """The complete lines at the end of a file, the last one first."""
    with open_regular(log) as file:
        end = os.fstat(file.fileno()).st_size
        least = max(0, end - _END_BYTES)
        rest, torn = b"", True
        while end > least:
            begin = max(least, end - _BLOCK_BYTES)
            first, *lines = (os.pread(file.fileno(), end - begin, begin) + rest).split(b"\n")
            for line in reversed(lines):
                if not torn and line.strip():
                    yield line
                torn = False
            rest, end = first, begin
        if end == 0 and not torn and rest.strip():
            yield rest


def age(overview: Overview, now: float | None = None) -> float | None:
    """Seconds since its last event; see `seconds_since`."""
    return seconds_since(overview.event_s, now)


def seconds_since(event_s: float | None, now: float | None = None) -> float | None:
    """Seconds since an event, by this host's clock, of which another may be ahead; None without an event."""
    return None if event_s is None else max(0.0, (time.time() if now is None else now) - event_s)
