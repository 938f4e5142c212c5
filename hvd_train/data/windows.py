"""How the rows of a part are cut into blocks, and how many blocks are mixed in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hvd_train.data.deal import Span
from hvd_train.data.format import ShardInfo
from hvd_train.data.layout import HELD_BYTES, Layout, repack_line
from hvd_train.data.picked import AnyRows, Picked
from hvd_train.errors import DataError

Blocks = npt.NDArray[np.int64]
"""Row ranges, [blocks, 2]: the first row of each and the one after its last."""

BLOCK_BYTES = 256 << 10
WINDOW_BLOCKS = 128

_CHUNK_BYTES = 1 << 20
"""Blocks are whole chunks up to this size. Larger ones are cut, unless that would decode them many times."""

_WINDOW_BYTES = BLOCK_BYTES * WINDOW_BLOCKS

_MIXED_BLOCKS = 8
"""Of fewer large blocks the rows would hardly be mixed. A window that has them may be larger."""

_MOST_WINDOW_BYTES = 128 << 20

_COSTLY = 8
"""Bytes decoded for each byte that is used, beyond which chunks are refused."""


def cut(rows: AnyRows, block_bytes: int, window_blocks: int) -> tuple[Blocks, int]:
    """Blocks of about `block_bytes`, and how many of them a window has: `window_blocks` or fewer.

    A block is a whole number of chunks of up to 1 MiB. Larger ones are cut if they are read in part, or if a
    window needs so few of them that they are decoded about once for it. Otherwise a block is one band of such
    chunks, and a window has as many blocks as 32 MiB hold, or up to 8 within 128 MiB.

    Opens every file. `DataError` for chunks that would have to be decoded again and again.
    """
    if isinstance(rows, Picked):
        of_all, window_blocks = cut(rows.rows, block_bytes, window_blocks)
        return rows.blocks(of_all), window_blocks
    blocks, offset = [np.empty((0, 2), np.int64)], 0
    for _, group in groupby(rows.spans, key=lambda span: span.shard):
        spans = tuple(group)
        step, aligned = _step(rows.info(spans[0]), rows.row_bytes, block_bytes, window_blocks)
        if aligned:
            window_blocks = min(window_blocks, _blocks_of(step * rows.row_bytes))
        for bounds in _bounds(spans, step, joined=aligned):
            blocks.append(np.stack([bounds[:-1], bounds[1:]], axis=1) + offset)
            offset += int(bounds[-1])
    return np.concatenate(blocks), window_blocks


def _blocks_of(num_bytes: int) -> int:
    """Blocks of a window, if a block is so large."""
    return max(_WINDOW_BYTES // num_bytes, min(_MIXED_BLOCKS, _MOST_WINDOW_BYTES // num_bytes), 1)


def _step(info: ShardInfo, row_bytes: int, block_bytes: int, window_blocks: int) -> tuple[int, bool]:
    """Rows of a block, at whose multiples in the file blocks end; and whether that is for the sake of a large
    chunk, which may be shared by several spans."""
    wanted = max(1, block_bytes // max(1, row_bytes))
    unit = info.chunk_rows
    if unit is None or unit * row_bytes > _CHUNK_BYTES:
        unit = info.checksum_rows if (info.checksum_rows or wanted) <= wanted else None
    step = max(1, wanted // (unit or 1)) * (unit or 1)
    aligned = step
    for name, layout in info.layouts.items():
        touched = layout.touched_bytes(step, window_blocks) / max(1, window_blocks * step * row_bytes)
        # Up to once for each window: few chunks of a dataset of small rows, such as labels.
        if touched <= 1:
            continue
        if layout.unit_rows * row_bytes <= HELD_BYTES:
            aligned = max(aligned, layout.unit_rows)
        elif layout.filtered and touched > _COSTLY:
            raise DataError(_refusal(info, name, layout, touched))
    return aligned, aligned > step


def _bounds(spans: Sequence[Span], step: int, *, joined: bool) -> Iterator[npt.NDArray[np.int64]]:
    """Where the blocks of `spans`, of one shard, begin and end, counted from the first row of each span; of
    spans that are `joined`, from that of the first: the rows of one step are one block, though rows of
    other parts are between them."""
    bounds: list[npt.NDArray[np.int64]] = []
    offset = 0
    for number, span in enumerate(spans):
        inner = np.arange((span.start // step + 1) * step, span.stop, step) - span.start
        begins = not (joined and number) or span.start // step != (spans[number - 1].stop - 1) // step
        bounds.append(np.concatenate([[0] if begins else [], inner]).astype(np.int64) + offset)
        if joined:
            offset += span.num_rows
        else:
            yield np.append(bounds.pop(), span.num_rows)
    if joined:
        yield np.append(np.concatenate(bounds), offset)


def _refusal(info: ShardInfo, name: str, layout: Layout, touched: float) -> str:
    return (
        f"{info.path}: dataset `{name}` is compressed in {layout.in_words()}. To read its rows in random "
        f"order, {touched:,.0f} bytes have to be decoded for each byte that is used; expected at most "
        f"{_COSTLY}. Either give --data.reading memory, if all rows of a rank fit into its memory, or write "
        f"the file in smaller chunks: `{repack_line(info.path, name, info.layouts)}`."
    )
