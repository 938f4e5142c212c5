"""What `hvd_train evaluate` found, in plain values: for its table, its JSON and its page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class WorstSample:
    """A sample on which the model is far off."""

    loss: float
    shard: str
    row: int
    """Of the shard."""
    target: float | None
    """None where a target is not one number."""
    predicted: dict[str, float]
    """What the task predicts for it, where that is one number, by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one model on some data; they do not depend on the number of ranks."""

    run: str
    checkpoint: str
    """The name of its folder."""
    round: int
    data: str
    num_samples: int
    metrics: dict[str, float]
    values: dict[str, Any]
    """Metrics that are more than one number, as nested lists."""
    undefined: list[str]
    """The names of numbers that are not defined; those of lists as `recall_by_class[3]`."""
    remarks: list[str]
    """What a user should know of how the figures came about, one line each."""
    worst: list[WorstSample]
    """The largest loss first."""
    class_names: list[str] = dataclasses.field(default_factory=list)
    """By class number; empty if classes have no names but their numbers."""

    def to_json(self) -> dict[str, Any]:
        """For a JSON file: numbers that are not finite are null."""
        plain: dict[str, Any] = _finite({"schema": SCHEMA, **dataclasses.asdict(self)})
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
