"""The charts of the layers of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_train.monitor import analysis
from hvd_train.monitor.charts.figure import Chart, Figure, array, axis, line, positions
from hvd_train.monitor.history import History

MOST_LINES = 24
"""Layers that have a line each; of more, a heat map shows all."""

_MOST_CELLS = 400_000
_MOST_COLUMNS = 500


def layer_charts(history: History) -> list[Chart]:
    """The layers of one run; empty where none were observed."""
    start = history.start
    observed = [e for e in history.layers if start is not None and len(e.norm) == len(start.layers)]
    if not observed or start is None:
        return []
    layers, rounds = start.layers, np.array([e.round for e in observed], float)
    mean = np.stack([e.gradient["mean"] for e in observed]).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.stack([analysis.relative_steps(e) for e in observed])
        gradients = np.log10(mean)
        spread = np.log10(np.stack([e.gradient["max"] / e.gradient["min"] for e in observed]))
    return [
        _of_layers(
            layers,
            rounds,
            steps,
            name="steps",
            title="relative step of each layer (log10)",
            meaning="The norm of a layer's update over that of the layer, for one local step. About -3 is "
            "healthy (the band): far below, the layer hardly learns; far above, `optim.lr` is too high for "
            "it. All steps become smaller together as the training converges.",
            band=analysis.HEALTHY,
        ),
        _of_layers(
            layers,
            rounds,
            gradients,
            name="gradients",
            title="gradient of each layer (log10 of its root mean square)",
            meaning="The mean over the ranks, in their last local step. A layer whose gradients are "
            "smaller by orders of magnitude than the others' does not learn; gradients that grow need "
            "`optim.clip_norm`.",
        ),
        _of_layers(
            layers,
            rounds,
            spread,
            name="spread",
            title="gradients of the ranks, largest over smallest (log10)",
            meaning="0 means that the gradients of all ranks are as large. Above 1 their data differ much: "
            "shuffle the rows before they are written into shards, or lower `sync.period`.",
        ),
    ]


def _of_layers(
    layers: list[str],
    rounds: np.ndarray,
    values: np.ndarray,
    *,
    name: str,
    title: str,
    meaning: str,
    band: tuple[float, float] | None = None,
) -> Chart:
    """A line for each layer, or a heat map of many."""
    values = np.where(np.isfinite(values), values, np.nan)
    heat = len(layers) > MOST_LINES
    data, layout = _heat_map(layers, rounds, values) if heat else _lines(layers, rounds, values, band)
    return Chart(
        name=name,
        title=title,
        meaning=meaning,
        data=data,
        layout=layout,
        height=min(1200, 160 + 14 * len(layers)) if heat else 380,
    )


def _lines(
    layers: list[str], rounds: np.ndarray, values: np.ndarray, band: tuple[float, float] | None
) -> tuple[list[Figure], Figure]:
    data: list[Figure] = [line(label, rounds, values[:, i]) for i, label in enumerate(layers)]
    whole: dict[str, Any] = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "line": {"width": 0}}
    shown = [{**whole, "y0": band[0], "y1": band[1], "fillcolor": "rgba(0,158,115,0.16)"}] if band else []
    return data, {"xaxis": axis("rounds"), "shapes": shown, "showlegend": True}


def _heat_map(layers: list[str], rounds: np.ndarray, values: np.ndarray) -> tuple[list[Figure], Figure]:
    step = max(1, -(-values.size // _MOST_CELLS), len(rounds) // _MOST_COLUMNS)
    chosen = np.arange((len(rounds) - 1) % step, len(rounds), step)
    heat = {
        "type": "heatmap",
        "x": positions(rounds[chosen]),
        "y": layers,
        "z": array(values[chosen].T),
        "colorscale": "Viridis",
    }
    return [heat], {"xaxis": axis("rounds"), "yaxis": {"autorange": "reversed"}}
