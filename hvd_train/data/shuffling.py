"""Rows in another order: at random, or by shard. They are dealt to files first, each of which is then
sorted in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hvd_train.data.format import FieldSpec
from hvd_train.data.sources.base import Block
from hvd_train.data.spool import Spool, bytes_of_row

MEMORY_BYTES = 64 << 20
"""Of rows that are sorted in memory, and of those that wait to be written to the files, each."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_keys(seed: int, rows: npt.NDArray[np.int64], stream: int = 0) -> npt.NDArray[np.uint64]:
    """A number for each row number, uniform over 64 bits and different for different rows of one `stream`.

    The outputs of SplitMix64 (Steele, Lea and Flood 2014) at these places. Sorted by them, rows are in an
    order that depends on the seed and on their numbers alone."""
    (base,) = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        z = base + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def arranged(
    blocks: Iterable[Block],
    fields: Mapping[str, FieldSpec],
    sizes: list[int],
    shard_of: Callable[[Block], npt.NDArray[np.intp]] | None,
    seed: int | None,
    folder: Path,
) -> Iterator[Block]:
    """The rows of `blocks`, those of shard 0 first, and within a shard in random order.

    Args:
        sizes: rows of each shard; of all together if `shard_of` is None.
        shard_of: which shard each row of a block is for; None for one.
        seed: None keeps the order within a shard.
        folder: for files of as many bytes as the rows, removed at the end.

    Memory: about three times `MEMORY_BYTES`. Raises OSError.
    """
    largest = max(sizes) * bytes_of_row(fields)
    # Buckets have about half of what may be in memory: the number of rows in each is random.
    splits = 0 if seed is None else max(0, (2 * largest // MEMORY_BYTES).bit_length())
    with tempfile.TemporaryDirectory(prefix=".rows-", suffix=".tmp", dir=folder) as scratch:
        count = len(sizes) << splits
        buckets = [Spool(Path(scratch) / str(i), fields) for i in range(count)]
        row = 0
        for block in blocks:
            length = len(next(iter(block.values())))
            keys = random_keys(seed or 0, np.arange(row, row + length))
            row += length
            bucket = np.zeros(length, np.intp) if shard_of is None else shard_of(block) << splits
            if splits:
                bucket = bucket | (keys >> np.uint64(64 - splits)).astype(np.intp)
            _deal(block, bucket, keys, buckets)
            del block  # a large row need not be there while the next is read
        for spool in buckets:
            yield from spool.blocks() if seed is None else spool.sorted_blocks()
            spool.remove()


def _deal(
    block: Block, bucket: npt.NDArray[np.intp], keys: npt.NDArray[np.uint64], buckets: list[Spool]
) -> None:
    order = np.argsort(bucket, kind="stable")
    starts = np.flatnonzero(np.diff(bucket[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        spool = buckets[bucket[rows[0]]]
        # Most rows that are large come alone: no copy of those.
        piece = block if len(rows) == len(order) else {name: array[rows] for name, array in block.items()}
        spool.append(piece, keys[rows])
    if sum(spool.pending_bytes for spool in buckets) > MEMORY_BYTES:
        for spool in buckets:
            spool.flush()
