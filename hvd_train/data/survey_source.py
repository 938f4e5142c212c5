"""What has to be known of a source before its first row is written: its rows, and those of each class or
group."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hvd_train.data.format import Array
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.sources.base import GROUP, TARGETS, Source
from hvd_train.data.splitting import Splitter


@dataclass
class Seen:
    """Numbers of rows."""

    num_rows: int = 0
    strata: dict[int, int] = field(default_factory=dict)
    """Of each target."""
    groups: dict[int, int] = field(default_factory=dict)
    """Of each group."""


def survey_source(source: Source, *, strata: bool, groups: bool, progress: Progress = unseen) -> Seen:
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
        progress(_step(source, seen.num_rows))
    return Seen(seen.num_rows, dict(sorted(seen.strata.items())), dict(sorted(seen.groups.items())))


def classes_of_first(source: Source, splitter: Splitter, num_rows: int, progress: Progress) -> dict[int, int]:
    """Rows of each class in the first of the parts of a new `splitter`. Raises `DataError`."""
    counts: dict[int, int] = {}
    row = 0
    for block in source.blocks([TARGETS, *splitter.needed]):
        row += len(block[TARGETS])
        _count(counts, block[TARGETS][splitter.parts_of(block) == 0])
        progress(Step("read to count classes", row, num_rows))
    return dict(sorted(counts.items()))


def _step(source: Source, row: int) -> Step:
    if source.num_rows is None:
        return Step("read to count rows", *source.position, "bytes")
    return Step("read to count classes or groups", row, source.num_rows)


def _count(counts: dict[int, int], values: Array) -> None:
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        counts[int(value)] = counts.get(int(value), 0) + int(count)
