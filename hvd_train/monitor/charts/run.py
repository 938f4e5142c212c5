"""The charts of one run over its rounds, or of several that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_train.monitor.charts.figure import (
    MOST_POINTS,
    Chart,
    Figure,
    Over,
    array,
    axis,
    line,
    positions,
    upright,
)
from hvd_train.monitor.charts.ranks import PHASE_COLORS
from hvd_train.monitor.charts.rules import stop_rules
from hvd_train.monitor.history import History

Named = Sequence[tuple[str, History]]
"""Runs with their names."""

_MOST_METRICS = 8


def run_charts(runs: Named, over: Over = "rounds") -> list[Chart]:
    """Of one run, or of several that are compared."""
    charts = [
        _error(runs, over),
        _loss(runs, over),
        *_metrics(runs, over),
        _schedule(runs, over),
        _drift(runs, over),
        _speed(runs, over),
        _shares(runs, over),
    ]
    return [chart for chart in charts if chart is not None]


def _along(history: History, over: Over) -> np.ndarray:
    """Where the lines of rounds are on the horizontal axis."""
    if over == "rounds":
        return history.columns["round"]
    return history.samples() if over == "samples" else history.seconds()


def _x(history: History, events: Sequence[Any], over: Over) -> np.ndarray:
    """Where other events are on it."""
    at = np.array([event.round for event in events], float)
    if over == "rounds" or not history.rounds:
        return at
    values = _along(history, over)
    return values[np.minimum(np.searchsorted(history.columns["round"], at), len(values) - 1)]


def _error(runs: Named, over: Over) -> Chart | None:
    """The metric that the first run watches."""
    metric = next((h.start.metric for _, h in runs if h.start is not None and h.evaluations), "")
    data = _of_metric(runs, over, metric)
    if not data:
        return None
    layout: Figure = {}
    if len(runs) == 1:
        ((_, history),) = runs
        more, layout = stop_rules(history, _x(history, history.evaluations, over))
        data += more
    return Chart(
        name="error",
        title=metric,
        meaning="The value that the stop rules follow. If it rises while the loss falls, the model overfits; "
        "if it jumps, lower `optim.lr` or `sync.period`.",
        data=data,
        layout={
            "xaxis": axis(over),
            "yaxis": upright(_values(runs, metric)),
            "showlegend": len(data) > 1,
            **layout,
        },
        height=380,
    )


def _metrics(runs: Named, over: Over) -> list[Chart]:
    """The other metrics of the evaluations."""
    begun = [h for _, h in runs if h.start is not None and h.evaluations]
    names = {name for h in begun for name in h.evaluations[-1].metrics}
    watched = [h.start.metric for h in begun if h.start is not None]
    others = sorted((names | set(watched)) - set(watched[:1]))
    charts = []
    for i, metric in enumerate(others[:_MOST_METRICS]):
        data = _of_metric(runs, over, metric)
        layout = {"xaxis": axis(over), "yaxis": upright(_values(runs, metric)), "showlegend": len(data) > 1}
        who = "The stop rules of some runs follow" if metric in watched else "No stop rule follows"
        title = f"{metric} in the evaluations"
        charts.append(
            Chart(
                name=f"metric-{i}",
                title=title,
                meaning=f"{who} it.",
                data=data,
                layout=layout,
            )
        )
    return charts


def _of_metric(runs: Named, over: Over, metric: str) -> list[Figure]:
    """A line for each run that has this metric."""
    return [
        line(name, _x(history, history.evaluations, over), values)
        for name, history in runs
        if len(values := _values([(name, history)], metric)) and not np.isnan(values).all()
    ]


def _values(runs: Named, metric: str) -> np.ndarray:
    """A metric in the evaluations of runs, one after the other; not a number where there is none."""
    found = []
    for _, history in runs:
        watched = history.start is not None and history.start.metric == metric
        found += [e.error if watched else e.metrics.get(metric) for e in history.evaluations]
    return np.array(found, float)


def _rounds(runs: Named, over: Over, figure: str) -> list[Figure]:
    """A line for each run over its rounds."""
    return [line(name, _along(h, over), h.columns[figure]) for name, h in runs if h.rounds]


def _loss(runs: Named, over: Over) -> Chart | None:
    data = _rounds(runs, over, "loss")
    if not data:
        return None
    return Chart(
        name="loss",
        title="training loss",
        meaning="The mean over the samples of each round. Where it does not fall from the start, raise "
        "`optim.lr`; where it grows, lower it or set `optim.clip_norm`.",
        data=data,
        layout={
            "xaxis": axis(over),
            "yaxis": upright(np.concatenate([h.columns["loss"] for _, h in runs])),
            "showlegend": len(data) > 1,
        },
    )


def _schedule(runs: Named, over: Over) -> Chart | None:
    data = _rounds(runs, over, "lr")
    if not data:
        return None
    alone = len(runs) == 1
    if alone:
        data[0]["name"] = "learning rate"
    for name, history in runs:
        style = {"yaxis": "y2", "line": {"dash": "dot", "shape": "hv"}}
        label = "period" if alone else f"{name}: period"
        data.append(line(label, _along(history, over), history.columns["period"], **style))
    right = {"overlaying": "y", "side": "right", "title": {"text": "period"}, "rangemode": "tozero"}
    return Chart(
        name="schedule",
        title="learning rate and period",
        meaning="What each round was trained with. The period is the number of local steps between two "
        "averages.",
        data=data,
        layout={
            "xaxis": axis(over),
            "yaxis": {"title": {"text": "learning rate"}, "rangemode": "tozero"},
            "yaxis2": {**right, "showgrid": False},
            "showlegend": True,
        },
    )


def _drift(runs: Named, over: Over) -> Chart | None:
    data, values = [], []
    for name, history in runs:
        drift = history.columns["drift"]
        known = drift > 0  # it is not measured in every round
        if known.any():
            data.append(line(name, _along(history, over)[known], drift[known]))
            values.append(drift[known])
    if not data:
        return None
    return Chart(
        name="drift",
        title="drift",
        meaning="How far the ranks move apart between two averages: the mean squared distance of their "
        "parameters from the mean. If it grows over the run, lower `sync.period` or `optim.lr`.",
        data=data,
        layout={
            "xaxis": axis(over),
            "yaxis": upright(np.concatenate(values)),
            "showlegend": len(data) > 1,
        },
    )


def _speed(runs: Named, over: Over) -> Chart | None:
    data = []
    for name, history in runs:
        if len(history.rounds) > 1:
            seconds = np.diff(history.seconds())
            samples = history.columns["samples"][1:]
            with np.errstate(divide="ignore", invalid="ignore"):
                speed = np.where(seconds > 0, samples / seconds, np.nan)
            data.append(line(name, _along(history, over)[1:], speed, line={"shape": "vh"}))
    if not data:
        return None
    return Chart(
        name="speed",
        title="samples/s",
        meaning="Of all ranks. Dips at evaluations and checkpoints are normal; a lasting drop is a rank "
        "that became slow: see the page of the ranks.",
        data=data,
        layout={"xaxis": axis(over), "yaxis": {"rangemode": "tozero"}, "showlegend": len(data) > 1},
    )


def _shares(runs: Named, over: Over) -> Chart | None:
    ((_, history), *others) = runs
    if others or not history.rounds:
        return None
    ends, shares = _summed(_along(history, over), history)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "phases",
            "name": phase,
            "x": positions(ends),
            "y": array(shares[i]),
            "line": {"width": 0, "color": color, "shape": "vh"},
            "fillcolor": color,
        }
        for i, (phase, color) in enumerate(PHASE_COLORS.items())
    ]
    return Chart(
        name="shares",
        title="where the time goes",
        meaning="The share of each phase, of the median rank. Much `wait`: one rank is slow; much "
        "`communication`: raise `sync.period`; much `data`: `data.reading = 'memory'`, or larger chunks.",
        data=data,
        layout={
            "xaxis": axis(over),
            "yaxis": {"range": [0, 1], "tickformat": ".0%"},
            "showlegend": True,
        },
    )


def _summed(x: np.ndarray, history: History) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the phases in groups of rounds, [phases, groups], and where each group ends."""
    seconds = np.stack([history.columns.medians(phase) for phase in PHASE_COLORS])
    length = -(-len(x) // (MOST_POINTS // 4))
    begins = np.arange(0, len(x), length)
    summed = np.add.reduceat(seconds, begins, axis=1)
    total = summed.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(total > 0, summed / total, 0.0)
    return x[np.minimum(begins + length, len(x)) - 1], shares
