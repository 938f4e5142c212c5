"""Which reader a rank's rows get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, ShardInfo
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen

_ORDER_BYTES = 16
"""Of a row in the order of an epoch: when an epoch begins, the order of the one before still exists."""


def make_reader(
    spans: Sequence[Span],
    data: DataConfig,
    seed: int,
    fields: Mapping[str, FieldSpec],
    memory_budget_bytes: int,
    screen: Screen | None = None,
    known: Sequence[ShardInfo] = (),
) -> Reader:
    """The reader of one rank's part; `data.reading` chooses, `auto` takes memory where the part fits
    into `memory_budget_bytes`. `reader.mode` says which it became. With a `screen` batches have marks. Shards
    whose headers are `known` are opened when their rows are read."""
    rows = Rows(spans, fields, screen=screen, known=known)
    if data.reading == "memory" or (data.reading == "auto" and _fits(rows, memory_budget_bytes)):
        return MemoryReader(rows, seed)
    return StreamReader(rows, seed)


def _fits(rows: Rows, budget_bytes: int) -> bool:
    """Whether all rows fit into memory, and the largest of their chunks while it is decoded."""
    left = budget_bytes - len(rows) * (rows.row_bytes + _ORDER_BYTES)
    if left < 0:
        return False
    return all(layout.decoding_bytes <= left for _, layouts in rows.layouts() for layout in layouts.values())
