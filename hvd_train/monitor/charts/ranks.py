"""The charts of the ranks of a run and their hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_train.io.text import counted
from hvd_train.monitor import analysis
from hvd_train.monitor.charts.figure import Chart, Figure, array, axis, line, positions
from hvd_train.monitor.events import Machine, Ranks, Start
from hvd_train.monitor.history import History

MOST_LANES = 64
"""Ranks that have a lane each; of more, the busiest have one, and the heat map shows all."""

PHASE_COLORS = {"data": "#e69f00", "compute": "#0072b2", "wait": "#9aa5b1", "communication": "#cc79a7"}
"""In the order of a round."""

_LANES_OF_MANY = 32
_LAST = 6
"""Lines of rounds in the lanes."""
_MOST_CELLS = 400_000
_MOST_COLUMNS = 500
_MOST_LINES = 8


def rank_charts(history: History) -> list[Chart]:
    """The ranks of one run; empty where they were not observed."""
    start = history.start
    if start is None:
        return []
    charts = [_lanes(history, start), _busy(history, start), *_machines(history, start)]
    return [chart for chart in charts if chart is not None]


def _lanes(history: History, start: Start) -> Chart | None:
    """A lane for each rank: its phases in the last rounds, one after the other."""
    lines = [e for e in history.ranks[-_LAST:] if _is_whole(e, start)]
    if not lines:
        return None
    shown = np.arange(start.world_size)
    if start.world_size > MOST_LANES:
        busy = lines[-1].seconds["data"] + lines[-1].seconds["compute"]
        shown = np.sort(np.argsort(-busy, kind="stable")[:_LANES_OF_MANY])
    data = _bars(lines, shown, _labels(history, start, shown))
    many = f" of the {len(shown)} busiest ranks" if len(shown) < start.world_size else " per rank"
    return Chart(
        name="lanes",
        title=f"a lane{many}: the last {counted(len(lines), 'round')}, up to {lines[-1].round:,}",
        meaning="What each rank did, round after round. All ranks end a round together: the one without "
        "`wait` is the one that the others wait for. Give it less work or more cores, or look for other "
        "processes on its host.",
        data=data,
        layout={
            "barmode": "overlay",
            "bargap": 0.25,
            "showlegend": True,
            "xaxis": {"title": {"text": "seconds"}},
            "yaxis": {"title": {"text": "rank"}, "autorange": "reversed", "type": _kind(start)},
        },
        height=150 + 24 * len(shown),
    )


def _is_whole(event: Ranks, start: Start) -> bool:
    """Whether it has every phase of every rank; before a resume there may have been others."""
    return all(len(event.seconds.get(phase, ())) == start.world_size for phase in PHASE_COLORS)


def _bars(lines: Sequence[Ranks], shown: np.ndarray, labels: list[str] | list[list[str]]) -> list[Figure]:
    """The phases of each line of rounds, behind those of the line before it."""
    data, begin = [], 0.0
    for event in lines:
        count = event.rounds[1] - event.rounds[0] + 1
        label = f"round {event.round:,}" if count == 1 else f"mean of {count} rounds up to {event.round:,}"
        at = np.full(len(shown), begin)
        for phase, color in PHASE_COLORS.items():
            seconds = event.seconds[phase][shown] / count
            bars: Figure = {
                "type": "bar",
                "orientation": "h",
                "name": phase,
                "legendgroup": phase,
                "showlegend": event is lines[-1],
                "y": labels,
                "x": array(seconds),
                "base": positions(at),
                "marker": {"color": color, "line": {"width": 0}},
                "customdata": array(seconds),
                "hovertemplate": f"%{{customdata:.3s}}s {phase}, {label}<extra>rank %{{y}}</extra>",
            }
            data.append(bars)
            at = at + seconds
        begin = float(at.max())  # of all ranks: a round ends for all together
    return data


def _labels(history: History, start: Start, ranks: np.ndarray) -> list[str] | list[list[str]]:
    """The names of ranks on an axis: in the groups of their hosts where there are several."""
    slow = {straggler.rank for straggler in analysis.stragglers(history)}
    names = [f"{rank} ◀ slow" if rank in slow else str(rank) for rank in ranks]
    if len(start.hosts) == 1:
        return names
    return [[analysis.host_of(history, int(rank)) for rank in ranks], names]


def _kind(start: Start) -> str:
    return "category" if len(start.hosts) == 1 else "multicategory"


def _busy(history: History, start: Start) -> Chart | None:
    """How long each rank was busy, over the median rank, as a heat map over the rounds."""
    lines = [e for e in history.ranks if _is_whole(e, start)]
    if start.world_size == 1 or not lines:
        return None
    step = max(1, -(-len(lines) * start.world_size // _MOST_CELLS), len(lines) // _MOST_COLUMNS)
    lines = lines[(len(lines) - 1) % step :: step]
    busy = np.stack([e.seconds["data"] + e.seconds["compute"] for e in lines])
    median = np.median(busy, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(median > 0, busy / median, np.nan)
    few = start.world_size <= MOST_LANES
    return Chart(
        name="busy",
        title="time that each rank is busy, over the median rank",
        meaning="1 is the median. A bright row is a rank that is always slow, bright rows side by side a "
        "slow host, a bright column a moment at which something else ran.",
        data=[
            {
                "type": "heatmap",
                "x": positions([e.round for e in lines]),
                "y": _labels(history, start, np.arange(start.world_size)) if few else None,
                "z": array(factor.T),
                "zmin": 0.5,
                "zmax": 2.0,
                "colorscale": "Viridis",
                "hovertemplate": "%{z:.2f} times the median, round %{x}<extra>rank %{y}</extra>",
            }
        ],
        layout={
            "xaxis": {**axis("rounds"), "range": [lines[0].round, lines[-1].round]},
            "yaxis": {
                "title": {"text": "rank"},
                "autorange": "reversed",
                **({"type": _kind(start)} if few else {}),
            },
        },
        height=min(900, 160 + 16 * min(start.world_size, MOST_LANES)),
    )


@dataclass(frozen=True)
class _Usage:
    """What ranks, or hosts, use."""

    name: str
    title: str
    unit: str
    meaning: str
    value: Callable[[Machine], np.ndarray]
    of_hosts: bool = False


_USAGES = (
    _Usage(
        "memory",
        "resident memory of each rank",
        "GiB",
        "Memory that ranks share counts for each. If it grows without an end, the task keeps tensors.",
        lambda machine: np.array(machine.rss_bytes, float) / 2**30,
    ),
    _Usage(
        "available",
        "memory left on each host",
        "GiB",
        "When none is left the host kills a rank: use fewer ranks a host, or `data.reading = 'stream'`.",
        lambda machine: np.array(machine.available_bytes, float) / 2**30,
        of_hosts=True,
    ),
    _Usage(
        "cpu",
        "cores that each rank keeps busy",
        "cores",
        "Below the number of its threads a rank waits: for data, for other ranks, or for cores that it "
        "shares.",
        lambda machine: machine.cpu,
    ),
    _Usage(
        "throttled",
        "share of the time in which the CPU limit held a rank back",
        "share",
        "Its cgroup gives the rank fewer cores than its threads use: ask for more, or lower `threads`.",
        lambda machine: machine.throttled,
    ),
)


def _machines(history: History, start: Start) -> list[Chart]:
    """What the ranks use of their hosts."""
    ranks = [f"rank {rank}" for rank in range(start.world_size)]
    sizes = (len(ranks), len(start.hosts))
    observed = [m for m in history.machine if (len(m.rss_bytes), len(m.available_bytes)) == sizes]
    x = np.array([m.round for m in observed], float)
    charts = []
    for usage in _USAGES if observed else ():
        values = np.stack([usage.value(m) for m in observed])
        if usage.name == "throttled" and not values.any():
            continue
        layout = {"xaxis": axis("rounds"), "yaxis": {"title": {"text": usage.unit}, "rangemode": "tozero"}}
        charts.append(
            Chart(
                name=usage.name,
                title=usage.title,
                meaning=usage.meaning,
                data=_spread(x, values, start.hosts if usage.of_hosts else ranks),
                layout={**layout, "showlegend": True},
            )
        )
    return charts


def _spread(x: np.ndarray, values: np.ndarray, names: list[str]) -> list[Figure]:
    """A line for each of few ranks or hosts, else the smallest, median and largest."""
    if len(names) <= _MOST_LINES:
        return [line(name, x, values[:, i]) for i, name in enumerate(names)]
    spread = (("least", values.min(1)), ("median", np.median(values, 1)), ("most", values.max(1)))
    return [line(label, x, of_all) for label, of_all in spread]
