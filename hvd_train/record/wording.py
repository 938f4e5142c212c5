"""What the console prints, as lines of text: the header, the running line, the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from hvd_train.io.text import counted, listed, spread
from hvd_train.record.reports import RoundReport, RunStart, StopReport

REASONS = {
    "patience": "the error has not improved for {patience} evaluations",
    "target_error": "the error has reached its target",
    "max_epochs": "the limit of epochs is reached",
    "max_rounds": "the limit of rounds is reached",
    "max_seconds": "the limit of time is reached",
    "diverged": "the training diverged",
    "interrupted": "it was asked to stop",
}
"""Every reason to stop, in words."""


LEFT_OUT = {
    "not_finite": "hold values that are not finite",
    "damaged": "cannot be read or are not what was written",
    "alone": "would have been alone in a batch",
}
"""Why rows were not used, in words."""

_DIGITS_ALONE = (
    "rank 0 sees only the digits 0-4, rank 1 only 5-9: neither can learn the ten classes from its own shard"
)
_NAMED_HOSTS = 4
_NAMED_RANKS = 8


def header_lines(header: RunStart) -> list[str]:
    """What will run."""
    version = header.versions.get("hvd_train", "")
    lines = [
        f"hvd_train {version}: {header.task}, {header.model}, {header.num_parameters:,} parameters",
        _labelled("data", _data(header)),
        *(_labelled("reading", line) for line in _reading(header)),
        _labelled("world", _world(header)),
        _labelled("training", f"batches of {header.batch_size}, {_average(header)}"),
        _labelled("stop", _stop_rules(header)),
    ]
    if header.init:
        lines.append(_labelled("init", header.init))
    if header.num_frozen:
        lines.append(_labelled("frozen", f"{header.num_frozen:,} of {header.num_parameters:,} parameters"))
    if header.compile_s:
        took = f"at most {max(header.compile_s):.1f} s on a rank"
        lines.append(_labelled("compiled", f"by torch.compile, which took {took}"))
    if not header.sees_signs:
        lines.append(_labelled("waiting", _waiting(header)))
    if header.data == "digits" and header.world_size == 2:
        outcome = "and they are never averaged" if header.period is None else "only the average can"
        lines.append(_labelled("digits", f"{_DIGITS_ALONE}, {outcome}"))
    if header.round:
        lines.append(_labelled("resumed", f"after round {header.round}"))
    return [*lines, _labelled("run", header.run)]


def closing_lines(header: RunStart, stop: StopReport) -> list[str]:
    """Why the run ended, what came out, and where it is."""
    reason = REASONS.get(stop.reason, stop.reason).format_map(header.stop_rules)
    lines = [_labelled("stopped", f"{reason} (round {stop.round})"), _labelled(header.metric, _outcome(stop))]
    speed = f"{stop.samples:,} samples in {duration(stop.seconds)}"
    if stop.seconds > 0:
        speed += f": {stop.samples / stop.seconds:,.0f} samples/s"
    lines += [_labelled("speed", speed), _labelled("run", header.run)]
    if stop.passes:
        lines.append(_labelled("passes", passes_of(stop.passes)))
    if stop.left_out:
        rows = [f"{counted(n, 'row')} that {LEFT_OUT[reason]}" for reason, n in stop.left_out.items()]
        lines.append(_labelled("left out", f"{', '.join(rows)}, in all epochs together"))
    if stop.missing:
        lines.append(_labelled("missing", stop.missing))
    # No model is recommended that was never evaluated, or that is not the one of the line above.
    if Path(stop.checkpoints.get("best", "")).name == f"round-{stop.best_round}":
        lines += [_labelled("best", stop.checkpoints["best"]), _labelled("load it", _load_it(header))]
    elif stop.best is not None and not stop.missing:
        lines.append(
            _labelled("best", f"the model of round {stop.best_round} could not be saved and is lost")
        )
    if stop.reason == "diverged":
        lines.append(_labelled("advice", "a smaller learning rate (--lr), or --optim.clip-norm 1"))
    elif "latest" in stop.checkpoints and header.period is not None:  # without averages it cannot go on
        lines.append(_labelled("go on", _go_on(header)))
    return lines


def _load_it(header: RunStart) -> str:
    task = ", task=..." if header.task_is_given else ""
    return f"hvd_train.load_model({_quoted(header.run)}{task})"


def _go_on(header: RunStart) -> str:
    if header.task_is_given:
        return f"the same program, with resume = {_quoted(header.run)} in its configuration"
    return f"--resume {shlex.quote(header.run)}"


def _quoted(text: str) -> str:
    """As Python and TOML take it."""
    return json.dumps(text, ensure_ascii=False)


def number(value: float | None) -> str:
    """A loss or an error in a few digits; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.4g}"


def period_of(report: RoundReport) -> str:
    """The local steps of a round; the least and the largest number where ranks differ."""
    return spread(report.steps) if report.steps else str(report.period)


def passes_of(passes: Sequence[float]) -> str:
    """How often the rows of each rank have counted; of many ranks the least and the most often."""
    if len(passes) <= _NAMED_RANKS:
        return f"{listed([f'rank {rank} {value:.2f}' for rank, value in enumerate(passes)])} over its rows"
    ranks = range(len(passes))
    low, high = min(ranks, key=passes.__getitem__), max(ranks, key=passes.__getitem__)
    middle = median(passes)
    return (
        f"rank {low} {passes[low]:.2f} to rank {high} {passes[high]:.2f} over its rows, median {middle:.2f}"
    )


def figure(value: float | None) -> str:
    """A metric, which may be a count: whole numbers without digits after the point."""
    return f"{value:,.0f}" if value is not None and value.is_integer() and value > 1 else number(value)


def duration(seconds: float) -> str:
    """`8.2 s`, `12 min 5 s` or `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _labelled(label: str, text: str) -> str:
    return f"{label:<9} {text}"


def _range(values: Sequence[int], noun: str) -> str:
    low, high = min(values), max(values)
    return counted(low, noun) if low == high else f"{low:,} to {high:,} {noun}s"


def _data(header: RunStart) -> str:
    shards, samples = _range(header.shards_per_rank, "shard"), _range(header.samples_per_rank, "sample")
    validation = (
        f"{counted(header.validation_samples, 'validation sample')}"
        if header.validation_samples
        else f"no validation data, so that the {header.metric} is the smoothed training loss"
    )
    return f"{header.data}: {shards} and {samples} per rank, {validation}"


def _reading(header: RunStart) -> Iterator[str]:
    """Ranks that read in the same way together."""
    ranks: dict[str, list[str]] = {}
    for rank, how in enumerate(header.reading):
        ranks.setdefault(how, []).append(str(rank))
    for how, alike in ranks.items():
        mode, _, why = how.partition(": ")
        noun = "rank" if len(alike) == 1 else "ranks"
        where = "" if len(ranks) == 1 else f" on {noun} {listed(alike, _NAMED_RANKS)}"
        yield f"{mode}{where}: {why}"


def _world(header: RunStart) -> str:
    names = ", ".join(header.hosts[:_NAMED_HOSTS]) + (", ..." if len(header.hosts) > _NAMED_HOSTS else "")
    ranks = f"{counted(header.world_size, 'rank')} on {counted(len(header.hosts), 'host')} ({names})"
    text = f"{ranks}, backend {header.backend}, {_range(header.threads, 'thread')} per rank"
    return text if header.world_size == 1 else f"{text}; a killed rank {header.lost_rank}"


def _waiting(header: RunStart) -> str:
    return (
        "ranks see no signs of life of each other: a rank is given up after "
        f"{header.stall_timeout_s:g} s, or three times the longest round so far"
    )


def _average(header: RunStart) -> str:
    if header.period is None:
        return "the ranks are never averaged"
    if header.mode == "gradients":
        return f"gradients in every local step; a round is {counted(header.period, 'local step')}"
    if header.schedule:
        return header.schedule
    return (
        "average after every local step"
        if header.period == 1
        else f"average every {header.period} local steps"
    )


def _stop_rules(header: RunStart) -> str:
    rules, metric = header.stop_rules, header.metric
    words: dict[str, Callable[[float], str]] = {
        "patience": lambda n: f"{counted(int(n), 'evaluation')} without a better {metric}",
        "target_error": lambda value: f"{metric} {value:g}",
        "max_epochs": lambda n: counted(int(n), "epoch"),
        "max_rounds": lambda n: counted(int(n), "round"),
        "max_seconds": lambda seconds: f"{seconds:g} s",
        "divergence": lambda factor: f"{metric} above {factor:g} times the best",
    }
    return " or ".join(say(rules[name]) for name, say in words.items() if name in rules)


def _outcome(stop: StopReport) -> str:
    if stop.best is None:
        return f"never measured; last {number(stop.final)}" if stop.final is not None else "never measured"
    return f"best {number(stop.best)} at round {stop.best_round}, final {number(stop.final)}"
