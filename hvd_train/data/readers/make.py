"""Which reader a rank's rows get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec
from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows

_ORDER_BYTES = 16
"""Of a row in the order of an epoch: when an epoch begins, the order of the one before still exists."""


def make_reader(
    spans: Sequence[Span],
    data: DataConfig,
    seed: int,
    fields: Mapping[str, FieldSpec],
    memory_budget_bytes: int,
) -> Reader:
    """The reader of one rank's part; `data.reading` chooses, `auto` takes memory where the part fits
    into `memory_budget_bytes`. `reader.mode` says which it became."""
    reader = reader_of(Rows(spans, fields), data, seed, memory_budget_bytes)
    reader.open()
    return reader


def reader_of(
    rows: AnyRows,
    data: DataConfig,
    seed: int,
    memory_budget_bytes: int,
    *,
    repeats: bool = True,
    share: Share = ALONE,
) -> Reader:
    """The same of `rows`, not opened. `repeats`: whether more than one epoch reads them; `share`: what this
    rank takes of every batch."""
    if data.reading == "memory" or (data.reading == "auto" and _fits(rows, memory_budget_bytes)):
        return MemoryReader(rows, seed, share=share)
    return StreamReader(rows, seed, repeats=repeats, share=share)


def _fits(rows: AnyRows, budget_bytes: int) -> bool:
    """Whether all rows fit into memory, and the largest of their chunks while it is decoded."""
    left = budget_bytes - len(rows) * (rows.row_bytes + _ORDER_BYTES)
    if left < 0:
        return False
    return all(layout.decoding_bytes <= left for _, layouts in rows.layouts() for layout in layouts.values())
