"""A run in plain texts: what the page and the report print around their charts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from hvd_train.io.regular import open_regular
from hvd_train.io.text import counted
from hvd_train.monitor import analysis
from hvd_train.monitor.events import Checkpoint, Event, Fault, Other, PeriodChange, Start, Stop
from hvd_train.monitor.history import History
from hvd_train.monitor.state import State
from hvd_train.record.wording import REASONS, duration, number
from hvd_train.run.layout import CONFIG_FILE

KINDS = {
    "running": "good",
    "starting": "good",
    "finished": "done",
    "interrupted": "warn",
    "diverged": "bad",
    "crashed": "bad",
}
"""How a state is coloured."""

_MOST_EVENTS = 500
_MOST_CONFIG_BYTES = 200_000
_MUCH = 0.3
"""The share of a phase that is worth a sentence."""


def detail(history: History, state: State) -> str:
    """What is known of the state besides its name, to follow it in a sentence."""
    if history.stop is not None and history.start is not None and state.name != "starting":
        reason = history.stop.reason
        with contextlib.suppress(KeyError):  # of a later version, or without the rule in its header
            reason = REASONS[reason].format_map(history.start.stop_rules)
        return f", {reason}" + (f"; {history.stop.missing}" if history.stop.missing else "")
    return f", {state.detail}" if state.detail else ""


def facts(history: History, state: State) -> list[tuple[str, str]]:
    """The figures of a run, each with its name."""
    start = history.start
    if start is None:
        return []
    found = [*_progress(history), ("ranks", f"{start.world_size:,} on {counted(len(start.hosts), 'host')}")]
    sent = history.machine[-1].sent_bytes if history.machine else None
    if sent:
        found.append(("sent by all ranks", f"{sent / 1e6:,.1f} MB"))
    found += [
        ("backend", start.backend),
        ("model", f"{start.model}, {start.num_parameters:,} parameters"),
        ("data", start.data),
    ]
    if history.last is not None:
        found.append(("last event", clock(history.last.time_s)))
    if state.is_live:
        found.append(("stops at", analysis.what_will_stop(history) or "nothing but a signal"))
    return found


def _progress(history: History) -> list[tuple[str, str]]:
    start = history.start
    assert start is not None
    last = history.rounds[-1] if history.rounds else None
    evaluation = history.evaluations[-1] if history.evaluations else None
    speed, seconds = analysis.samples_per_s(history), history.seconds()
    best = f"{number(evaluation.best)} in round {evaluation.best_round:,}" if evaluation else "-"
    period = "never averaged"
    if start.period is not None:
        period = counted(last.period if last else start.period, "local step")
    return [
        (start.metric, number(evaluation.error) if evaluation else "-"),
        ("best", best),
        ("round", f"{history.last.round:,}" if history.last else "-"),
        ("epoch", f"{last.epoch:.2f}" if last else "-"),
        ("loss", number(last.loss) if last else "-"),
        ("samples/s", "-" if speed is None else f"{speed:,.0f}"),
        ("training for", duration(float(seconds[-1])) if len(seconds) else "-"),
        ("period", period),
        ("learning rate", "-" if last is None or last.lr is None else f"{last.lr:.4g}"),
    ]


def findings(history: History) -> list[str]:
    """What stands out, in one sentence each, with what to do."""
    found = [f"{straggler}." for straggler in analysis.stragglers(history)]
    shares = analysis.shares(history)
    if shares.get("data", 0.0) > _MUCH:
        found.append(
            f"The median rank reads for {shares['data']:.0%} of the time: try `data.reading = 'memory'`, "
            "larger chunks of the shards, or a copy of the shards on the hosts' own disks."
        )
    if shares.get("communication", 0.0) > _MUCH:
        remedy = "raise `sync.period`, or shorten the messages by `sync.wire`"
        if history.start is not None and history.start.mode == "gradients":
            remedy = "average the parameters every few local steps in place of gradients (`--sync average`)"
        found.append(f"Averages take {shares['communication']:.0%} of the time: {remedy}.")
    layer = analysis.odd_layer(history)
    return [*found, layer] if layer else found


def events(history: History) -> list[tuple[str, str, str, str]]:
    """Starts, checkpoints, faults, ends and what later versions record, the newest first: round, time, event,
    and what happened."""
    kept: list[Event] = [
        *history.starts,
        *history.checkpoints,
        *history.faults,
        *history.periods,
        *history.others,
        *history.stops,
    ]
    kept.sort(key=lambda event: event.time_s, reverse=True)
    return [(f"{event.round:,}", clock(event.time_s), *_words(event)) for event in kept[:_MOST_EVENTS]]


def clock(time_s: float) -> str:
    """A time of a log, in this host's zone; the number where it is no time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    except (OverflowError, ValueError, OSError):
        return f"{time_s:g} s"


def _words(event: Event) -> tuple[str, str]:
    if isinstance(event, Start):
        hosts = counted(len(event.hosts), "host")
        world = f"{counted(event.world_size, 'rank')} on {hosts}, backend {event.backend}"
        return ("resumed", world) if event.round else ("started", world)
    if isinstance(event, Checkpoint):
        size = f"{event.num_bytes / 1e6:.1f} MB in {duration(event.seconds)}"
        return f"checkpoint ({event.reason})", f"{Path(event.path).name}, {size}"
    if isinstance(event, Fault):
        return f"fault ({event.kind})", event.message
    if isinstance(event, PeriodChange):
        return "period", event.message
    if isinstance(event, Other):
        return event.kind, event.text
    assert isinstance(event, Stop)
    outcome = f"best {number(event.best)}, final {number(event.final)}"
    return f"stop ({event.reason})", event.missing or outcome


def configuration(folder: Path) -> str:
    """The run's config.toml; or why it cannot be shown."""
    file = folder / CONFIG_FILE
    try:
        with open_regular(file) as opened:
            return opened.read(_MOST_CONFIG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"# {CONFIG_FILE} cannot be read: {error.strerror}"


def versions(start: Start | None) -> str:
    """Of what the run used, in one line."""
    return ", ".join(f"{name} {version}" for name, version in start.versions.items()) if start else ""


def differences(configurations: Sequence[dict[str, object]]) -> list[tuple[str, ...]]:
    """The keys whose values differ, with the value of each configuration, as text."""
    keys = sorted({key for one in configurations for key in one})
    rows = [(key, *(str(one.get(key, "-")) for one in configurations)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]
