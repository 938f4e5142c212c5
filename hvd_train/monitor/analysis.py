"""What the events of a run mean: its speed, where the time goes, who is slow and why, what will stop it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hvd_train.monitor.events import Layers, Round
from hvd_train.monitor.history import History
from hvd_train.record.reports import PHASES
from hvd_train.record.wording import number

_RECENT_S = 30.0
"""Seconds of training that count as recent."""
_SLOW = 1.25
"""A rank that is busy for so many times the median is a straggler,"""
_SLOW_SHARE = 0.05
"""if that costs the others more than this share of their time."""
_THROTTLED = 0.05
_LESS_CPU = 0.75
HEALTHY = (-4.0, -2.0)
"""log10 of the relative step of one local step that is healthy."""
_UNLIKE = 1.0
"""Orders of magnitude from the median layer at which an unhealthy one stands out. All steps become smaller
together as the training converges."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    host: str
    factor: float
    """Its busy time over the median of all ranks."""
    phase: str
    """Where the time goes: `data` or `compute`."""
    why: str
    """What is known of the reason; may be empty."""

    def __str__(self) -> str:
        doing = "reading batches" if self.phase == "data" else "in local steps"
        why = f": {self.why}" if self.why else ""
        busy = f"is busy {self.factor:.1f} times as long as the median"
        return f"rank {self.rank} on {self.host} {busy}, {doing}{why}"


def recent(history: History) -> list[Round]:
    """The lines of rounds of the last seconds of training; at least two where there are two."""
    rounds = history.rounds
    first = len(rounds) - 1
    while first > 0 and (
        len(rounds) - first < 2 or 0 <= rounds[-1].time_s - rounds[first - 1].time_s < _RECENT_S
    ):
        first -= 1
    return rounds[max(first, 0) :]


def samples_per_s(history: History) -> float | None:
    """Of this start, if it has stopped, else of its recent rounds; None before its second line of rounds."""
    start, stop = history.start, history.stop
    if stop is not None:
        return stop.samples / stop.seconds if stop.seconds > 0 else None
    lines = [r for r in recent(history) if start is not None and r.round > start.round]
    if len(lines) < 2 or lines[-1].time_s <= lines[0].time_s:
        return None
    return sum(r.samples for r in lines[1:]) / (lines[-1].time_s - lines[0].time_s)


def shares(history: History) -> dict[str, float]:
    """The share of each phase in the recent rounds, of the median rank; empty where nothing was measured."""
    seconds = {p: sum(r.seconds[p].median for r in recent(history) if p in r.seconds) for p in PHASES}
    total = sum(seconds.values())
    return {phase: s / total for phase, s in seconds.items()} if total > 0 else {}


def stragglers(history: History) -> list[Straggler]:
    """The ranks that the others wait for, the slowest first, by the last seconds of each rank."""
    start = history.start
    if start is None or start.world_size == 1 or not history.ranks:
        return []
    seconds = history.ranks[-1].seconds
    if any(phase not in seconds or len(seconds[phase]) != start.world_size for phase in PHASES):
        return []
    data, compute = seconds["data"], seconds["compute"]
    busy = data + compute
    median = float(np.median(busy))
    whole = float(np.median(sum(seconds[phase] for phase in PHASES)))
    slow = np.flatnonzero((busy > _SLOW * median) & (busy - median > _SLOW_SHARE * whole))
    extra = {"data": data - np.median(data), "compute": compute - np.median(compute)}
    return [
        Straggler(
            rank=int(rank),
            host=host_of(history, int(rank)),
            factor=float(busy[rank] / median) if median > 0 else math.inf,
            phase=max(extra, key=lambda phase: float(extra[phase][rank])),
            why=_why_slow(history, int(rank)),
        )
        for rank in sorted(slow, key=lambda rank: -busy[rank])
    ]


def _why_slow(history: History, rank: int) -> str:
    if not history.machine:
        return ""
    machine = history.machine[-1]
    if rank >= len(machine.cpu):
        return ""
    if machine.throttled[rank] > _THROTTLED:
        return f"the CPU limit of its cgroup holds it back in {machine.throttled[rank]:.0%} of the periods"
    median = float(np.median(machine.cpu))
    if machine.cpu[rank] < _LESS_CPU * median:
        return (
            f"it gets {machine.cpu[rank]:.2f} cores, the median rank {median:.2f}: it sleeps, waits for its "
            "data, or shares its cores"
        )
    return ""


def host_of(history: History, rank: int) -> str:
    """The name of a rank's host; empty where the log does not say."""
    start = history.start
    if start is None:
        return ""
    if len(start.hosts) == 1:
        return start.hosts[0]
    return start.hosts[start.host_of_rank[rank]] if rank < len(start.host_of_rank) else ""


def patience_left(history: History) -> tuple[int, int] | None:
    """Evaluations without improvement that the run may still have, and how many it may have in all; None
    without that rule, and where the log does not say."""
    start = history.start
    patience = int(start.stop_rules.get("patience", 0)) if start else 0
    if start is None or patience == 0:
        return None
    best_round = history.evaluations[-1].best_round if history.evaluations else 0
    if 0 < best_round <= history.starts[0].round:
        return None  # it was resumed under another name: evaluations since the best are in another log
    since = sum(e.round > max(best_round, history.patience_from) for e in history.evaluations)
    return max(0, patience - since), patience


def what_will_stop(history: History) -> str:
    """The rules that will end the run, in words, with what is left of each."""
    start = history.start
    if start is None:
        return ""
    rules, parts = start.stop_rules, []
    left = patience_left(history)
    if left is not None:
        parts.append(f"{left[0]} of {left[1]} evaluations without improvement left")
    if "target_error" in rules:
        parts.append(f"{start.metric} at {number(rules['target_error'])}")
    round_ = history.last.round if history.last else 0
    if "max_rounds" in rules:
        parts.append(f"{max(0, int(rules['max_rounds']) - round_):,} rounds to the limit")
    epoch = history.rounds[-1].epoch if history.rounds else 0.0
    if "max_epochs" in rules:
        parts.append(f"{max(0.0, rules['max_epochs'] - epoch):.1f} epochs to the limit")
    if "max_seconds" in rules:
        parts.append(f"the limit of {rules['max_seconds']:g} s")
    return ", or ".join(parts)


def relative_steps(layers: Layers) -> np.ndarray:
    """log10 of ||update|| / ||parameter|| of one local step, for each layer: float64 [layers]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps: np.ndarray = np.log10(layers.update.astype(float) / layers.norm / layers.period)
    return steps


def odd_layer(history: History) -> str:
    """The layer whose relative step is unhealthy, and most unlike that of the median layer, in a sentence;
    empty if none stands out."""
    start = history.start
    if start is None or not history.layers or len(history.layers[-1].norm) != len(start.layers):
        return ""
    steps = relative_steps(history.layers[-1])
    if not len(steps) or np.isnan(steps).all():
        return ""
    median, (low, high) = float(np.nanmedian(steps)), HEALTHY
    with np.errstate(invalid="ignore"):
        unlike = np.where((steps < low) | (steps > high), np.abs(steps - median), 0.0)
    unlike[np.isneginf(steps)] = np.inf
    i = int(unlike.argmax())
    if unlike[i] < _UNLIKE:
        return ""
    if np.isneginf(steps[i]):
        return f"`{start.layers[i]}` does not move at all: it gets no gradient, or its learning rate is 0."
    what = "hardly learns" if steps[i] < low else "moves much in each step"
    remedy = "a larger learning rate" if steps[i] < low else "a smaller learning rate, or optim.clip_norm"
    return (
        f"`{start.layers[i]}` {what}: log10 of its relative step is {steps[i]:.1f}, of the median layer "
        f"{median:.1f}; {low:g} to {high:g} is healthy. Try {remedy} for it."
    )
