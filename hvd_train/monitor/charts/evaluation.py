"""Charts of one evaluation: confusion matrix, ROC curves, calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_train.monitor.charts.figure import Chart, array, line
from hvd_train.record.evaluation import Evaluation

_MOST_CURVES = 8
_UNIT = {"range": [0, 1.02]}


def evaluation_charts(evaluation: Evaluation) -> list[Chart]:
    """Those for which the evaluation has values."""
    values = evaluation.values
    charts = []
    if "confusion" in values:
        charts.append(_confusion(np.array(values["confusion"], float)))
    if "roc_curves" in values:
        charts.append(_roc(values["roc_curves"], values["roc_auc_by_class"]))
    if "reliability" in values:
        charts.append(_calibration(np.array(values["reliability"], float)))
    return charts


def _confusion(counts: np.ndarray) -> Chart:
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    return Chart(
        name="confusion",
        title="Confusion matrix",
        meaning="The share of the samples of each class (row) that is predicted as each class (column). "
        "Off the diagonal are the errors.",
        data=[
            {
                "type": "heatmap",
                "z": array(shares),
                "customdata": counts.astype(int).tolist() if len(counts) <= 100 else None,
                "zmin": 0,
                "zmax": 1,
                "colorscale": "Viridis",
                "hovertemplate": "class %{y}, predicted %{x}: %{z:.1%} (%{customdata})<extra></extra>",
            }
        ],
        layout={
            "xaxis": {"title": {"text": "predicted"}, "dtick": 1 if len(counts) <= 30 else None},
            "yaxis": {
                "title": {"text": "class"},
                "dtick": 1 if len(counts) <= 30 else None,
                "autorange": "reversed",
            },
        },
        height=420,
    )


def _roc(curves: Sequence[Sequence[Sequence[float]]], areas: Sequence[float]) -> Chart:
    known = [c for c in range(len(curves)) if curves[c][0]]
    worst = sorted(known, key=lambda c: areas[c])[:_MOST_CURVES]
    which = "every class" if len(worst) == len(curves) else f"the {len(worst)} classes with the smallest area"
    return Chart(
        name="roc",
        title="ROC curves",
        meaning=f"Each class against the rest, for {which}: the share of its samples that is found, against "
        "the share of the others that is taken for it. The area is in the legend; 0.5 is chance.",
        data=[
            line(f"{c}: {areas[c]:.4f}", np.array(curves[c][0]), np.array(curves[c][1]))
            for c in sorted(worst)
        ],
        layout={
            "xaxis": {"title": {"text": "false positive rate"}, **_UNIT},
            "yaxis": {"title": {"text": "true positive rate"}, **_UNIT},
            "showlegend": True,
            "shapes": [{"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1}],
        },
        height=420,
    )


def _calibration(rows: np.ndarray) -> Chart:
    filled = rows[rows[:, 0] > 0]
    return Chart(
        name="calibration",
        title="Calibration",
        meaning="Accuracy against the confidence of the predictions, in bins of the confidence. On the "
        "diagonal a confidence is what it says; below it the model is too sure.",
        data=[
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "accuracy",
                "x": array(filled[:, 1]),
                "y": array(filled[:, 2]),
                "customdata": filled[:, 0].astype(int).tolist(),
                "hovertemplate": "confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata} "
                "samples<extra></extra>",
            }
        ],
        layout={
            "xaxis": {"title": {"text": "confidence"}, **_UNIT},
            "yaxis": {"title": {"text": "accuracy"}, **_UNIT},
            "shapes": [{"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1}],
        },
        height=420,
    )
