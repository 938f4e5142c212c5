"""The events of a run: without the rounds that a resume has undone, and in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import numpy as np

from hvd_train.monitor.columns import Columns
from hvd_train.monitor.events import (
    UNREADABLE,
    Checkpoint,
    Evaluation,
    Event,
    Fault,
    Layers,
    Machine,
    Other,
    PeriodChange,
    Ranks,
    Round,
    Spread,
    Start,
    Stop,
    decode,
)
from hvd_train.monitor.follow import Follower
from hvd_train.record.events import SCHEMA

MOST_ROUNDS = 40_000
"""Lines of rounds that are kept: with more of them, each two neighbours become one."""

_MOST_OTHERS = 1000
"""Events of unknown kinds that are kept: the newest."""

_MOST_FIGURES = 10_000_000
"""Figures of ranks, and of layers, that are kept: with more of them, every second event is left out."""


@final
class History:
    """The events of one run. What cannot be read is counted in `problems` and left out.

    Args:
        path: the run's event log.
    """

    def __init__(self, path: str | Path) -> None:
        self._follower = Follower(path)
        self._clear()

    def _clear(self) -> None:
        self._columns = Columns()
        self.starts: list[Start] = []
        self.rounds: list[Round] = []
        self.ranks: list[Ranks] = []
        self.machine: list[Machine] = []
        self.layers: list[Layers] = []
        self.evaluations: list[Evaluation] = []
        self.checkpoints: list[Checkpoint] = []
        self.faults: list[Fault] = []
        self.periods: list[PeriodChange] = []
        self.others: list[Other] = []
        self.stops: list[Stop] = []
        """All ends; the run may have been started again since."""
        self.stop: Stop | None = None
        """The end, unless the run was started again since."""
        self.last: Event | None = None
        """The newest event."""
        self.undone = 0
        """Rounds that resumes have undone."""
        self.patience_from = 0
        """The round after which patience is counted: that of the last start if the run had ended by
        patience before it."""
        self._damaged: list[tuple[int, str]] = []
        self._num_damaged = 0
        self._later_schema = 0

    @property
    def start(self) -> Start | None:
        """The last start."""
        return self.starts[-1] if self.starts else None

    @property
    def problems(self) -> list[str]:
        """What could not be read, in one sentence each."""
        found = []
        if self._num_damaged:
            number, why = self._damaged[0]
            more = f", and {self._num_damaged - 1} more like it" if self._num_damaged > 1 else ""
            found.append(f"line {number} of the log cannot be read ({why}){more}: left out.")
        if self._follower.skipped:
            found.append(f"line {self._follower.skipped[0]} of the log is too long for an event: left out.")
        if self._follower.is_waiting:
            found.append(f"line {self._follower.number + 1} of the log has not arrived completely yet.")
        if self._later_schema:
            found.append(
                f"the log has schema {self._later_schema}, this program knows {SCHEMA}: what is new in it is "
                "not shown."
            )
        return found

    def samples(self) -> np.ndarray:
        """Samples used until each of `rounds`, those before this log included: float64. A run that was
        resumed under another name begins with those of the other one, which its evaluations count."""
        used: np.ndarray = np.cumsum(self.columns["samples"])
        if not len(used) or not self.evaluations or not self.starts or self.starts[0].round == 0:
            return used
        first = self.evaluations[0]
        at = int(np.searchsorted(self.columns["round"], first.round))
        before = max(0.0, first.samples - float(used[min(at, len(used) - 1)]))
        return used + before if before else used

    @property
    def columns(self) -> Columns:
        """`rounds` as arrays."""
        self._columns.update(self.rounds)
        return self._columns

    def seconds(self) -> np.ndarray:
        """Seconds of training at each of `rounds`: float64. The time between two starts does not count."""
        return self.columns.seconds(self.starts)

    def update(self) -> bool:
        """Reads what is new; returns whether there was anything. Raises OSError if the log cannot be read;
        what was read before remains."""
        changed = False
        for line in self._follower.lines():
            if self._follower.restarted and not changed:
                self._clear()
            changed = True
            self._add(line)
        if self._follower.restarted and not changed:
            self._clear()
            return True
        if changed:
            self._thin()
        return changed

    def _add(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            event = decode(line)
            _check(event, self.start)
        except UNREADABLE as error:
            self._num_damaged += 1
            self._damaged = self._damaged or [(self._follower.number, _reason(error))]
            return
        self._later_schema = max(self._later_schema, event.schema if event.schema > SCHEMA else 0)
        self.last = event
        if isinstance(event, Start):
            self._begin(event)
        elif isinstance(event, Stop):
            self.stop = event
            self.stops.append(event)
        else:
            self._list_of(event).append(event)

    def _begin(self, start: Start) -> None:
        """A start; what it undoes goes."""
        if self.rounds:
            self.undone += max(0, self.rounds[-1].round - start.round)
        for events in self._lists():
            while events and events[-1].round > start.round:
                events.pop()
        if self.stop is not None and self.stop.reason == "patience":
            self.patience_from = start.round
        self.starts.append(start)
        self.stop = None

    def _lists(self) -> tuple[list[Any], ...]:
        return (
            self.rounds,
            self.ranks,
            self.machine,
            self.layers,
            self.evaluations,
            self.checkpoints,
            self.faults,
            self.periods,
            self.others,
        )

    def _list_of(self, event: Event) -> list[Any]:
        kinds = (Round, Ranks, Machine, Layers, Evaluation, Checkpoint, Fault, PeriodChange, Other)
        return self._lists()[kinds.index(type(event))]

    def _thin(self) -> None:
        del self.others[:-_MOST_OTHERS], self.periods[:-_MOST_OTHERS]
        while len(self.rounds) > MOST_ROUNDS:
            pairs = zip(self.rounds[:-1:2], self.rounds[1::2], strict=True)
            odd = self.rounds[-1:] if len(self.rounds) % 2 else []
            self.rounds = [*(_joined(a, b) for a, b in pairs), *odd]
        start = self.start
        for events, width in (
            (self.ranks, 4 * start.world_size if start else 1),
            (self.machine, 3 * start.world_size if start else 1),
            (self.layers, 6 * max(1, len(start.layers)) if start else 1),
        ):
            while len(events) * width > _MOST_FIGURES and len(events) > 2:
                del events[-2::-2]  # the newest stays


def _check(event: Event, start: Start | None) -> None:
    """Raises ValueError for figures that do not belong to the start before them."""
    if isinstance(event, Start):
        if event.world_size < 1:
            raise ValueError("a world without ranks")
        if any(not 0 <= host < len(event.hosts) for host in event.host_of_rank):
            raise ValueError("ranks on hosts that are not named")
        return
    if start is None:
        raise ValueError("an event before the first header")
    if isinstance(event, Ranks):
        _require(event.seconds.values(), start.world_size, "ranks")
    elif isinstance(event, Machine):
        _require((event.rss_bytes, event.cpu, event.throttled), start.world_size, "ranks")
        _require((event.available_bytes,), len(start.hosts), "hosts")
    elif isinstance(event, Layers):
        figures = (event.norm, event.update, event.gradient_peak, *event.gradient.values())
        _require(figures, len(start.layers), "layers")


def _require(lists: Any, count: int, what: str) -> None:
    for values in lists:
        if len(values) != count:
            raise ValueError(f"{len(values)} figures for {count} {what}")


def _reason(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _joined(a: Round, b: Round) -> Round:
    """The rounds of both, as the log itself adds up rounds of one line."""
    total = a.samples + b.samples
    phases = {**a.seconds, **b.seconds}
    counted = [(r.loss, r.samples) for r in (a, b) if r.loss is not None and r.samples]
    weight = sum(samples for _, samples in counted)
    return Round(
        time_s=b.time_s,
        round=b.round,
        rounds=(a.rounds[0], b.rounds[1]),
        epoch=b.epoch,
        samples=total,
        loss=sum(loss * samples for loss, samples in counted) / weight if weight else None,
        seconds={phase: _added(a.seconds.get(phase), b.seconds.get(phase)) for phase in phases},
        period=b.period,
        lr=b.lr,
        drift=a.drift if b.drift is None else b.drift,
        zero_weight=sorted({*a.zero_weight, *b.zero_weight}),
        slowest=_slower(a, b),
    )


def _added(a: Spread | None, b: Spread | None) -> Spread:
    known = [s for s in (a, b) if s is not None]
    return Spread(sum(s.min for s in known), sum(s.median for s in known), sum(s.max for s in known))


def _slower(a: Round, b: Round) -> int | None:
    """The slowest rank of the line in which the slowest was busy for longer."""

    def busy(line: Round) -> float:
        return sum(s.max for phase, s in line.seconds.items() if phase in ("data", "compute"))

    return max((a, b), key=busy).slowest
