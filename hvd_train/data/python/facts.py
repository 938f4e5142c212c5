"""What is known of Python datasets before their samples are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from hvd_train.data.format import ShardInfo, is_class_dtype
from hvd_train.data.places import Places
from hvd_train.data.python.registry import made_of
from hvd_train.data.python.shard import header_of


def settle(paths: Iterable[str], places: Places) -> None:
    """Finds out what is known of those that are Python datasets. Raises `DataError`."""
    for made in filter(None, map(made_of, paths)):
        header_of(made, places)


def facts_of(paths: Iterable[str]) -> dict[str, Any]:
    """What must be the same on every rank of those that are Python datasets and settled, by what it is."""
    return {
        f"{what} of {os.path.basename(made.name)}": fact
        for made in filter(None, map(made_of, paths))
        for what, fact in made.facts().items()
    }


def is_read_for_targets(info: ShardInfo, targets: str) -> bool:
    """Whether every sample has to be made where the field `targets`, of class numbers, is asked for."""
    made, field = made_of(info.path), info.fields[targets]
    return made is not None and is_class_dtype(field.dtype) and not made.at_hand([field.place or targets])


def reading_lines(infos: Sequence[ShardInfo], targets: str) -> list[str]:
    """For each dataset whose samples are all read for their targets, a line that says so."""
    return [
        f"{info.path}: each rank reads its part of the {info.num_samples:,} samples once to count the "
        "classes, as the dataset has no attribute `targets` or `labels` with one for each."
        for info in infos
        if is_read_for_targets(info, targets)
    ]
