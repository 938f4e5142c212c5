"""The events of a log, typed, as this program and earlier ones write them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

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


class Other(Event):
    """An event of a kind that this program does not know, of a later version."""

    kind: str
    text: str
    """Its other figures, as JSON."""


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

_COMMON = ("event", "time_s", "round", "schema", "time")
_MOST_TEXT = 300

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)
"""What `decode` raises for a line that is not an event."""


class _Kind(msgspec.Struct):
    """What is read of a line first."""

    event: str


def decode(line: bytes) -> Event:
    """The event in a line. Raises one of `UNREADABLE`."""
    name = msgspec.json.decode(line, type=_Kind).event
    if name in KINDS:
        return msgspec.json.decode(line, type=KINDS[name], dec_hook=_array)
    common = msgspec.json.decode(line, type=Event)
    rest = {key: value for key, value in msgspec.json.decode(line).items() if key not in _COMMON}
    text = msgspec.json.encode(rest).decode()[:_MOST_TEXT]
    return Other(time_s=common.time_s, round=common.round, schema=common.schema, kind=name, text=text)


def _array(kind: type, values: Any) -> np.ndarray:
    """For msgspec, which does not know arrays."""
    array = np.array(values, np.float32)
    if array.ndim != 1:
        raise ValueError("expected a list of numbers")
    return array
