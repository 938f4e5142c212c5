"""The number of a row in the whole data set, the same whichever rank reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from hvd_train.data.deal import Span
from hvd_train.data.format import ShardInfo


class Origins(NamedTuple):
    """Where some rows are."""

    spans: tuple[Span, ...]
    """Those of the reader."""

    span_of: npt.NDArray[np.intp]
    """The index in `spans` of each row's span, [rows]."""

    rows: npt.NDArray[np.int64]
    """Its row in the shard, [rows]."""


@final
class Numbering:
    """Counts the rows of `shards` through, in their order."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        starts = np.cumsum([0, *(shard.num_samples for shard in shards)]).tolist()
        self._starts = {shard.path: start for shard, start in zip(shards, starts, strict=False)}
        self._of: tuple[Span, ...] = ()
        self._offsets = np.empty(0, np.int64)

    def __call__(self, origins: Origins) -> npt.NDArray[np.int64]:
        """The number of each row, [rows], counted from 0."""
        if origins.spans is not self._of:  # once for each reader: a part may have many spans
            self._of = origins.spans
            self._offsets = np.array([self._starts[span.shard] for span in origins.spans], np.int64)
        return self._offsets[origins.span_of] + origins.rows
