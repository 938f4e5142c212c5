"""What a shard and a manifest say, and what one sample looks like. Plain values; nothing is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One dataset of a sample: its `shape` without the sample axis, and its numpy `dtype` by name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """One sample of the whole data set, the same on every rank; what a task builds its model for."""

    inputs: str
    """Name of the dataset of inputs; a key of `fields` and of every batch."""

    targets: str
    """Name of the dataset of targets; likewise."""

    fields: Mapping[str, FieldSpec]
    """Every dataset of a sample."""

    num_classes: int | None = None
    """Classes of integer targets (tokens of the vocabulary for next-token): largest target of all shards
    plus one; None for targets that are not integers."""

    scale: float = 1.0
    """What integer inputs are multiplied by before the model."""

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SampleSpec:
        """The inverse of `to_json`."""
        fields = {
            name: FieldSpec(shape=tuple(f["shape"]), dtype=f["dtype"]) for name, f in values["fields"].items()
        }
        return cls(**{**values, "fields": fields})
