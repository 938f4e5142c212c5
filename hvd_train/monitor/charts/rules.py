"""The stop rules, drawn on the error curve: the best value, the patience that is left, the target, the
end."""

from __future__ import annotations

import numpy as np

from hvd_train.monitor import analysis
from hvd_train.monitor.charts.figure import Figure
from hvd_train.monitor.history import History


def stop_rules(history: History, x: np.ndarray) -> tuple[list[Figure], Figure]:
    """What is drawn besides the curve, and the layout.

    Args:
        x: where the evaluations are on the horizontal axis.
    """
    start, last = history.start, history.evaluations[-1]
    assert start is not None
    data: list[Figure] = []
    shapes: list[Figure] = []
    notes: list[Figure] = []
    best = next((i for i, e in enumerate(history.evaluations) if e.round == last.best_round), None)
    if best is not None and last.best is not None:
        star = {"size": 13, "symbol": "star", "color": "#e69f00"}
        point = {"x": [float(x[best])], "y": [last.best]}
        data.append({"type": "scatter", "mode": "markers", "name": "best", "marker": star, **point})
        shapes.append(_horizontal(last.best, "dot"))
    target = start.stop_rules.get("target_error")
    if target is not None:
        ends = {"x": [float(x[0]), float(x[-1])], "y": [target, target]}
        style = {"mode": "lines", "line": {"dash": "dash", "width": 1.5, "color": "#009e73"}}
        data.append({"type": "scatter", "name": f"target {target:g}", **style, **ends})
    text = _end(history)
    if text:
        at = float(x[-1])
        shapes.append({"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"})
        notes.append(_note(text, y=1.0, yref="paper", yanchor="top", xshift=-6, xref="x", x=at))
    if best is not None and history.stop is None:
        waiting = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below"}
        shapes.append(
            {**waiting, "x0": float(x[best]), "x1": float(x[-1]), "fillcolor": "rgba(230,159,0,0.10)"}
        )
    return data, {"shapes": shapes, "annotations": notes}


def _end(history: History) -> str:
    """Why the run stopped, or what patience is left."""
    if history.stop is not None:
        return f"stopped: {history.stop.reason}"
    left = analysis.patience_left(history)
    return f"patience: {left[0]} of {left[1]} evaluations left" if left else ""


def _horizontal(y: float, dash: str) -> Figure:
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1}
    return {**across, "y0": y, "y1": y, "line": {"dash": dash, "width": 1}}


def _note(text: str, **place: object) -> Figure:
    return {"text": text, "xref": "paper", "x": 1, "xanchor": "right", "showarrow": False, **place}
