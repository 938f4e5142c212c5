"""The events of a run: typed, without the rounds that a resume has undone, and in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, final

import msgspec
import numpy as np

from hvd_train.monitor.follow import Follower
from hvd_train.record.events import SCHEMA

Figure = float | None
"""A value that is not finite is null in the log."""

Array = np.ndarray
"""Figures of ranks or layers: float32, not a number for null."""


class Event(msgspec.Struct, kw_only=True):
    """What every event has."""

    time_s: float
    round: int
    schema: int = 1


class Spread(msgspec.Struct):
    """One figure over the ranks."""

    min: float
    median: float
    max: float


class Start(Event):
    """`header`: what will run."""

    run: str
    task: str
    model: str
    num_parameters: int
    world_size: int
    hosts: list[str]
    backend: str
    threads: list[int]
    period: int | None
    batch_size: int
    data: str
    shards_per_rank: list[int]
    samples_per_rank: list[int]
    validation_samples: int
    metric: str
    stop_rules: dict[str, int | float]
    versions: dict[str, str]
    lost_rank: str = ""
    stall_timeout_s: float | None = None
    host_of_rank: list[int] = []
    layers: list[str] = []
    layer_sizes: list[int] = []
    task_is_given: bool = False


class Round(Event):
    """`round`: one round, or several in a row."""

    rounds: tuple[int, int]
    epoch: float
    samples: int
    loss: Figure
    seconds: dict[str, Spread]
    period: int
    lr: Figure
    drift: Figure
    zero_weight: list[int]
    slowest: int | None = None


class Ranks(Event):
    """`ranks`: the seconds of each rank."""

    rounds: tuple[int, int]
    seconds: dict[str, Array]


class Machine(Event):
    """`machine`: what the ranks use of their hosts."""

    rss_bytes: list[int]
    cpu: Array
    throttled: Array
    available_bytes: list[int]
    sent_bytes: int | None


class Layers(Event):
    """`layers`: figures of each trainable parameter."""

    period: int
    norm: Array
    update: Array
    gradient: dict[str, Array]
    gradient_peak: Array


class Evaluation(Event):
    """`evaluation`."""

    epoch: float
    samples: int
    error: Figure
    metrics: dict[str, Figure]
    best: Figure
    best_round: int
    seconds: float


class Checkpoint(Event):
    """`checkpoint`."""

    path: str
    reason: str
    num_bytes: int
    seconds: float


class Fault(Event):
    """`fault`."""

    kind: str
    ranks: list[int]
    message: str


class Stop(Event):
    """`stop`: the end."""

    reason: str
    best: Figure
    best_round: int | None
    final: Figure
    samples: int
    seconds: float
    checkpoints: dict[str, str]
    missing: str = ""


KINDS: dict[str, type[Event]] = {
    "header": Start,
    "round": Round,
    "ranks": Ranks,
    "machine": Machine,
    "layers": Layers,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "fault": Fault,
    "stop": Stop,
}

MOST_ROUNDS = 40_000
"""Lines of rounds that are kept: with more of them, each two neighbours become one."""

_MOST_FIGURES = 10_000_000
"""Figures of ranks, and of layers, that are kept: with more of them, every second event is left out."""

E = TypeVar("E", bound=Event)


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)
"""What `decode` raises for a line that is not an event."""


class _Kind(msgspec.Struct):
    """What is read of a line first."""

    event: str


def decode(line: bytes) -> Event | None:
    """The event in a line; None for a kind that this program does not know, of a later version."""
    kind = KINDS.get(msgspec.json.decode(line, type=_Kind).event)
    return None if kind is None else msgspec.json.decode(line, type=kind, dec_hook=_array)


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
        self.starts: list[Start] = []
        self.rounds: list[Round] = []
        self.ranks: list[Ranks] = []
        self.machine: list[Machine] = []
        self.layers: list[Layers] = []
        self.evaluations: list[Evaluation] = []
        self.checkpoints: list[Checkpoint] = []
        self.faults: list[Fault] = []
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
            if event is None:
                return
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
        )

    def _list_of(self, event: Event) -> list[Any]:
        kinds = (Round, Ranks, Machine, Layers, Evaluation, Checkpoint, Fault)
        return self._lists()[kinds.index(type(event))]

    def _thin(self) -> None:
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


def _array(kind: type, values: Any) -> np.ndarray:
    """For msgspec, which does not know arrays."""
    array = np.array(values, np.float32)
    if array.ndim != 1:
        raise ValueError("expected a list of numbers")
    return array


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
