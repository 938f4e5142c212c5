"""The events of a log, typed, as this program and earlier ones write them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A number of things; larger ones are damage, and would not fit into a float."""

Time = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
"""Unix seconds, of a clock that may be wrong."""

Figure = float | None
"""A value that is not finite is null in the log."""

Array = np.ndarray
"""Figures of ranks or layers: float32, not a number for null."""


class Event(msgspec.Struct, kw_only=True):
    """What every event has."""

    time_s: Time
    round: Count
    schema: Count = 1


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
    num_parameters: Count
    world_size: Count
    hosts: list[str]
    backend: str
    threads: list[Count]
    period: Count | None
    batch_size: Count
    data: str
    shards_per_rank: list[Count]
    samples_per_rank: list[Count]
    validation_samples: Count
    metric: str
    stop_rules: dict[str, int | float]
    versions: dict[str, str]
    schedule: str = ""
    mode: str = "average"
    lost_rank: str = ""
    stall_timeout_s: float | None = None
    host_of_rank: list[Count] = []
    layers: list[str] = []
    layer_sizes: list[Count] = []
    task_is_given: bool = False


class Round(Event):
    """`round`: one round, or several in a row."""

    rounds: tuple[Count, Count]
    epoch: float
    samples: Count
    loss: Figure
    seconds: dict[str, Spread]
    period: Count
    lr: Figure
    drift: Figure
    zero_weight: list[Count]
    slowest: Count | None = None


class Ranks(Event):
    """`ranks`: the seconds of each rank."""

    rounds: tuple[Count, Count]
    seconds: dict[str, Array]


class Machine(Event):
    """`machine`: what the ranks use of their hosts."""

    rss_bytes: list[Count]
    cpu: Array
    throttled: Array
    available_bytes: list[Count]
    sent_bytes: Count | None


class Layers(Event):
    """`layers`: figures of each trainable parameter."""

    period: Count
    norm: Array
    update: Array
    gradient: dict[str, Array]
    gradient_peak: Array


class Evaluation(Event):
    """`evaluation`."""

    epoch: float
    samples: Count
    error: Figure
    metrics: dict[str, Figure]
    best: Figure
    best_round: Count
    seconds: float


class Checkpoint(Event):
    """`checkpoint`."""

    path: str
    reason: str
    num_bytes: Count
    seconds: float


class Fault(Event):
    """`fault`."""

    kind: str
    ranks: list[Count]
    message: str


class PeriodChange(Event):
    """`period`: why the period changes, or cannot."""

    period: Count
    message: str


class Stop(Event):
    """`stop`: the end."""

    reason: str
    best: Figure
    best_round: Count | None
    final: Figure
    samples: Count
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
    "period": PeriodChange,
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
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, np.float32)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    if array.ndim != 1:
        raise ValueError("expected a list of numbers")
    return array
