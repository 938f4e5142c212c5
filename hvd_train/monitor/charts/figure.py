"""What all charts share: the figure, and arrays, lines and axes as Plotly takes them.

Plotly's script draws plain dictionaries; its reference is https://plotly.com/javascript/reference/. Colours
that depend on the page's theme are the page's.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Over = Literal["rounds", "samples", "seconds"]
"""What the horizontal axis shows."""

MOST_POINTS = 2000
"""Points of one line: more of them cannot be told apart on a screen."""

_WIDE, _VERY_WIDE = 20, 1000
"""The largest over the smallest value from which on an axis is logarithmic, and has its labels at powers of
ten only."""

Figure = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure, what it means, and what to do where it looks bad."""

    name: str
    """Of the chart on its page: letters, digits and dashes."""
    title: str
    meaning: str
    data: list[Figure]
    layout: Figure = field(default_factory=dict)
    height: int = 280
    """Pixels."""


def array(values: Sequence[float] | np.ndarray) -> Figure:
    """Numbers as Plotly takes them in base64: 4 bytes each, and nothing to parse."""
    numbers = np.asarray(values, np.float32)
    packed = {"dtype": "f4", "bdata": base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()}
    return packed if numbers.ndim == 1 else {**packed, "shape": ",".join(map(str, numbers.shape))}


def positions(values: Sequence[float] | np.ndarray) -> Figure:
    """Places on an axis, which may need more digits: 8 bytes each."""
    numbers = np.ascontiguousarray(values, np.float64)
    return {"dtype": "f8", "bdata": base64.b64encode(numbers.tobytes()).decode()}


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points of a line: of each of so many parts of equal length the smallest and the
    largest value, so that no peak is lost."""
    if len(x) <= most:
        return x, y
    parts = most // 2
    length = len(x) // parts
    whole = y[: parts * length].reshape(parts, length)
    begins = np.arange(parts) * length
    low = begins + np.where(np.isnan(whole), np.inf, whole).argmin(1)
    high = begins + np.where(np.isnan(whole), -np.inf, whole).argmax(1)
    rest = np.arange(parts * length, len(x))
    chosen = np.unique(np.concatenate([low, high, rest, [0, len(x) - 1]]))
    return x[chosen], y[chosen]


def line(name: str, x: np.ndarray, y: Sequence[float | None] | np.ndarray, **style: Any) -> Figure:
    """A line through points, of which some may have no value; a single point is a marker."""
    kept_x, kept_y = thinned(x, np.array(y, float))
    return {
        "type": "scatter",
        "mode": "lines" if len(kept_x) > 1 else "markers",
        "name": name,
        "x": positions(kept_x),
        "y": positions(kept_y),
        **style,
    }


def upright(values: np.ndarray) -> Figure:
    """The vertical axis of positive values: by powers of ten where they differ much."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    if low <= 0 or high < _WIDE * low:
        return {}
    if high < _VERY_WIDE * low:
        return {"type": "log", "exponentformat": "none", "dtick": "D2"}
    return {"type": "log", "dtick": 1}


def axis(over: Over) -> Figure:
    """The horizontal axis."""
    return {"title": {"text": "seconds of training" if over == "seconds" else over}}
