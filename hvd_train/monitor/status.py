"""`hvd_train status`: the runs in a folder as a table, or one run in detail, on a terminal until it ends."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from hvd_train.config_values import require_usable
from hvd_train.errors import RunDirectoryError
from hvd_train.io.text import counted
from hvd_train.monitor import analysis, views
from hvd_train.monitor.history import History
from hvd_train.monitor.overview import Overview, age, is_run, overview, runs_in, seconds_since
from hvd_train.monitor.state import State, state_by
from hvd_train.record.console import is_terminal
from hvd_train.record.reports import PHASES
from hvd_train.record.wording import duration, number
from hvd_train.run.layout import EVENTS_FILE, run_of

_EVERY_S = 1.0
_PLAIN_WIDTH = 200
_CURVE_WIDTH = 60
_MOST_LINES = 3
"""Stragglers and faults that are shown."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = " _.-=+*#@"
_STYLES = {
    "running": "green",
    "starting": "cyan",
    "finished": "blue",
    "interrupted": "yellow",
    "diverged": "red",
    "crashed": "bold red",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show what runs are doing, or how they ended: a table of the runs in a folder, or one run in detail.

    On a terminal the view of a run that is going on is live; Ctrl-C ends it, not the run."""

    path: Annotated[Positional[str], arg(metavar="RUNS|RUN")] = "runs"
    """A folder of runs, or one run."""

    once: bool = False
    """Print the run once, also on a terminal."""

    def __post_init__(self) -> None:
        require_usable(self, "--")


def parse(args: Sequence[str]) -> Options:
    """Raises `ConfigError`; exits with code 2 for an option that does not exist."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, prog="hvd_train status", args=list(args), config=config)


def main(options: Options) -> int:
    """Prints the status; returns the exit code. Raises `RunDirectoryError` for a path without a run."""
    on_terminal = is_terminal(sys.stdout)
    console = Console() if on_terminal else Console(width=_PLAIN_WIDTH, color_system=None)
    path = Path(options.path)
    folder = run_of(path)
    if is_run(folder):
        _show_run(folder, console, live=on_terminal and not options.once)
    else:
        _print(_table(_overviews(path)), console)
    return 0


def _overviews(path: Path) -> list[Overview]:
    try:
        found = runs_in(path)
    except OSError as error:
        raise RunDirectoryError(
            f"{path}: {error.strerror}. Expected a folder of runs, or a run; give the one of --runs."
        ) from None
    if not found:
        raise RunDirectoryError(f"{path} has no runs. Expected a folder of runs, or a run with an event log.")
    return sorted((overview(folder) for folder in found), key=lambda o: o.event_s or 0.0, reverse=True)


def _table(found: Sequence[Overview]) -> Table:
    """The runs, the newest first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "event", "round", "error", "best", "samples/s", "ranks", "hosts"):
        numbers = name in ("round", "error", "best", "samples/s", "ranks", "hosts")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=name != "state")
    for run in found:
        seconds = age(run)
        table.add_row(
            Text(_printable(run.name)),
            _state(run),
            "-" if seconds is None else f"{duration(seconds)} ago",
            _count(run.round),
            number(run.last),
            number(run.best),
            "-" if run.samples_per_s is None else f"{run.samples_per_s:,.0f}",
            _count(run.ranks),
            _count(run.hosts),
        )
    return table


def _colored(state: State) -> Text:
    return Text(state.name, _STYLES.get(state.name, ""))


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _state(run: Overview) -> Text:
    """The state, with the reason where the state alone does not say it, and what could not be read."""
    text = _colored(run.state)
    if run.state.name == "finished":
        text.append(f": {_printable(run.state.detail)}")
    if run.problem:
        text.append(f" ({run.problem})")
    return text


def _show_run(folder: Path, console: Console, live: bool) -> None:
    history = History(folder / EVENTS_FILE)
    view, going_on = _update(folder, history, console)
    if not live or not going_on:
        _print(view, console)
        return
    with Live(view, console=console, auto_refresh=False) as shown:
        while going_on:
            time.sleep(_EVERY_S)
            view, going_on = _update(folder, history, console)
            shown.update(view, refresh=True)


def _update(folder: Path, history: History, console: Console) -> tuple[RenderableType, bool]:
    """The view with what is new, and whether the run goes on."""
    problem = ""
    try:
        history.update()
    except FileNotFoundError:
        problem = "there is no event log yet" if history.last is None else "the log is gone"
    except OSError as error:
        problem = f"the log cannot be read: {error.strerror}"
    state = state_by(folder, history)
    blocks = _BLOCKS if (console.encoding or "").lower().startswith("utf") else _ASCII_BLOCKS
    problems = [*([problem] if problem else []), *history.problems]
    first = _row("run", f"{folder}: ", _colored(state), views.detail(history, state))
    return Group(first, *_lines(history, state, problems, blocks)), state.is_live


def _lines(history: History, state: State, problems: Sequence[str], blocks: str) -> Iterator[Text]:
    """What follows the first line."""
    start = history.start
    if start is not None:
        hosts = counted(len(start.hosts), "host")
        yield _row("training", f"{start.task}, {start.model}; {counted(start.world_size, 'rank')} on {hosts}")
        yield _row("progress", _progress(history))
        if history.evaluations:
            last = history.evaluations[-1]
            at = f"best {number(last.best)} in round {last.best_round:,}"
            yield _row(start.metric, f"{curve(history, blocks)} {number(last.error)}, {at}")
        if state.is_live:
            yield _row("stops at", analysis.what_will_stop(history) or "nothing but a signal")
        yield _row("time", _phases(history))
        slow = analysis.stragglers(history)
        for straggler in slow[:_MOST_LINES]:
            yield _row("slow", Text(str(straggler), "yellow"))
        if len(slow) > _MOST_LINES:
            yield _row("", f"and {len(slow) - _MOST_LINES} more")
        if history.machine:
            yield _row("memory", _machine(history))
        layer = analysis.odd_layer(history)
        if layer:
            yield _row("layer", Text(layer, "yellow"))
        for fault in history.faults[-_MOST_LINES:]:
            yield _row("fault", Text(f"round {fault.round:,}: {fault.message}", "red"))
    for problem in problems:
        yield _row("log", Text(problem, "yellow"))


def _row(label: str, *parts: str | Text) -> Text:
    return Text.assemble((f"{_printable(label):<9} ", "bold"), *(_plain(part) for part in parts))


def _plain(part: str | Text) -> Text:
    text = Text(part) if isinstance(part, str) else part
    return Text(_printable(text.plain), text.style)


def _printable(text: str) -> str:
    """With escapes for what would change the terminal, or the line: names and messages are anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _progress(history: History) -> str:
    epoch = history.rounds[-1].epoch if history.rounds else 0.0
    loss = history.rounds[-1].loss if history.rounds else None
    speed = analysis.samples_per_s(history)
    seconds = seconds_since(history.last.time_s if history.last else None)
    return (
        f"round {history.last.round if history.last else 0:,}, epoch {epoch:.2f}, loss {number(loss)}, "
        f"{'-' if speed is None else f'{speed:,.0f}'} samples/s, last event "
        f"{'-' if seconds is None else duration(seconds)} ago"
    )


def curve(history: History, blocks: str) -> str:
    """The error over the evaluations, in one line: the largest value is the highest block."""
    values = [e.error for e in history.evaluations if e.error is not None and math.isfinite(e.error)]
    if not values:
        return ""
    width = min(_CURVE_WIDTH, len(values))
    shown = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    low, high = min(shown), max(shown)
    steps = len(blocks) - 2
    return "".join(blocks[1 + (round((v - low) / (high - low) * steps) if high > low else 0)] for v in shown)


def _phases(history: History) -> str:
    shares = analysis.shares(history)
    return ", ".join(f"{phase} {shares[phase]:.0%}" for phase in PHASES if phase in shares) or "-"


def _machine(history: History) -> str:
    machine = history.machine[-1]
    rss = f"{max(machine.rss_bytes) / 2**30:.2f} GiB in the largest rank"
    left = f"{min(machine.available_bytes) / 2**30:.1f} GiB left on the host with least"
    return (
        f"{rss}, {left}; {float(machine.cpu.min()):.2f} to {float(machine.cpu.max()):.2f} cores busy per rank"
    )


def _print(what: RenderableType, console: Console) -> None:
    """As lines without spaces at their ends, which rich adds."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what, soft_wrap=True)
    for line in captured.get().splitlines():
        print(line.rstrip())
