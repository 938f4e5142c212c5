"""Which values of a sample have a mean and a deviation together. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Grouping = Literal["component", "channel", "all"]
"""The values of each component of a sample, of each index along its first axis, or all of them."""


def usual_grouping(shape: Sequence[int]) -> Grouping:
    """What suits samples of this shape: vectors, images [height, width], and [channels, ...]."""
    if len(shape) < 2:
        return "component"
    return "all" if len(shape) == 2 or channels_last(shape) else "channel"


def channels_last(shape: Sequence[int]) -> bool:
    """Whether a sample looks like an image [height, width, channels]."""
    return len(shape) == 3 and shape[2] <= 4 < shape[0]


def shape_of_moments(shape: Sequence[int], grouping: Grouping) -> tuple[int, ...]:
    """The shape of the means of samples of this `shape`, with which they are broadcast."""
    if grouping == "component":
        return tuple(shape)
    return (shape[0], *(1 for _ in shape[1:])) if grouping == "channel" else ()
