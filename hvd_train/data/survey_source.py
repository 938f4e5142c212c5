"""What has to be known of a source before its first row is written: its rows, and those of each class or
group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hvd_train.data.format import Array
from hvd_train.data.sources.base import GROUP, TARGETS, Source


@dataclass
class Seen:
    """Numbers of rows."""

    num_rows: int = 0
    strata: dict[int, int] = field(default_factory=dict)
    """Of each target."""
    groups: dict[int, int] = field(default_factory=dict)
    """Of each group."""


def survey_source(source: Source, *, strata: bool, groups: bool) -> Seen:
    """Reads what it takes of the source, nothing if all is known. Raises `DataError`."""
    if source.num_rows is not None and not strata and not groups:
        return Seen(source.num_rows)
    seen = Seen()
    wanted = [name for name, on in ((TARGETS, strata or not groups), (GROUP, groups)) if on]
    for block in source.blocks(wanted):
        seen.num_rows += len(block[wanted[0]])
        if strata:
            _count(seen.strata, block[TARGETS])
        if groups:
            _count(seen.groups, block[GROUP])
    return Seen(seen.num_rows, dict(sorted(seen.strata.items())), dict(sorted(seen.groups.items())))


def _count(counts: dict[int, int], values: Array) -> None:
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        counts[int(value)] = counts.get(int(value), 0) + int(count)
