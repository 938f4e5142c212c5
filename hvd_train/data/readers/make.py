"""Which reader a rank's rows get."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, ShardInfo
from hvd_train.data.mapped import obstacle
from hvd_train.data.picked import AnyRows, Picked
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.mmap import MmapReader
from hvd_train.data.readers.permutation import ORDER_BYTES
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen
from hvd_train.environment.machine import LOCAL, file_system

_CACHED = 1.5
"""Times the budget: what is left of the free memory for the page cache, with a reserve."""

_LARGE_ROW_BYTES = 64 << 10
"""A drive reads rows of this size at random places nearly as fast as in order."""

_MOST_FILES = 256
"""That `auto` keeps mapped, each of which is an open file: many systems allow a process 1024."""


def make_reader(
    spans: Sequence[Span],
    data: DataConfig,
    seed: int,
    fields: Mapping[str, FieldSpec],
    memory_budget_bytes: int,
    screen: Screen | None = None,
    known: Sequence[ShardInfo] = (),
    copies: Mapping[str, str] | None = None,
) -> Reader:
    """The reader of one rank's part; `data.reading` chooses, `auto` takes memory where the part fits
    into `memory_budget_bytes`. `reader.mode` says which it became, and `reader.why` for what reason. With a
    `screen` batches have marks. Shards whose headers are `known` are opened when their rows are read.
    `copies` are read in place of their files."""
    rows = Rows(spans, fields, screen=screen, known=known, copies=copies)
    reader = reader_of(rows, data, seed, memory_budget_bytes)
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
    """The same of `rows`, not opened; rows that are picked from others are not mapped. `repeats`: whether
    more than one epoch reads them; `share`: what this rank takes of every batch."""
    if data.reading == "auto":
        return _choose(rows, seed, memory_budget_bytes, repeats, share)
    if data.reading == "memory":
        return MemoryReader(rows, seed, share=share)
    if data.reading == "mmap" and not isinstance(rows, Picked):
        return MmapReader(rows, seed, share=share)
    return StreamReader(rows, seed, repeats=repeats, share=share)


def _choose(rows: AnyRows, seed: int, budget_bytes: int, repeats: bool, share: Share) -> Reader:
    reader: Reader
    if _fits(rows, budget_bytes):
        reader = MemoryReader(rows, seed, share=share)
        reader.why = "the rows fit into half of the free memory"
        return reader
    too_large = "the rows do not fit into half of the free memory"
    if isinstance(rows, Picked):
        reason = "they are what is left of an epoch"
    elif share.ranks > 1:  # whose orders must be equal, whatever each of them sees
        reason = "all ranks share their order"
    else:
        reason = _why_not_mapped(rows, budget_bytes)
    if isinstance(rows, Picked) or reason:
        reader = StreamReader(rows, seed, repeats=repeats, share=share)
        reader.why = f"{too_large}, and are not mapped, since {reason}"
        return reader
    reader = MmapReader(rows, seed, share=share)
    reader.why = f"{too_large}, and the files can be mapped"
    return reader


def _fits(rows: AnyRows, budget_bytes: int) -> bool:
    """Whether all rows fit into memory, and the largest of their chunks while it is decoded."""
    left = budget_bytes - len(rows) * (rows.row_bytes + ORDER_BYTES)
    if left < 0:
        return False
    return all(layout.decoding_bytes <= left for _, layouts in rows.layouts() for layout in layouts.values())


def _why_not_mapped(rows: Rows, budget_bytes: int) -> str:
    """Why mapping would be slower, or is not possible; empty if neither. Opens every file."""
    if rows.screen is not None and rows.screen.skips_damage:
        return "damaged rows are found in blocks"
    paths = dict.fromkeys(span.shard for span in rows.spans)
    if len(paths) > _MOST_FILES:
        return f"there are {len(paths)} files"
    num_bytes = len(rows) * rows.row_bytes
    if num_bytes > _CACHED * budget_bytes and rows.row_bytes < _LARGE_ROW_BYTES:
        return f"they exceed the page cache, and rows of {rows.row_bytes} bytes are slow to read one by one"
    for path in paths:
        file = rows.shard(path).file
        if file is None:
            return "they come from a Python dataset"
        # Of others each fault is a request to a server, and a file may be cut short by another host.
        if (kind := file_system(Path(os.path.realpath(file.file_path)))) not in LOCAL:
            return f"a file is on {kind}, which is not known to be local"
        if reason := obstacle(file, list(rows.fields)):
            return reason.partition(". ")[0]
    return ""
