"""Whether shards hold what they and their manifest say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from hvd_train.data.blocks import checksum, class_counts, rows_per_block
from hvd_train.data.format import MANIFEST_NAME, Manifest, ShardEntry
from hvd_train.data.h5 import ShardFile
from hvd_train.data.locate import Found
from hvd_train.errors import DataError

_READ_BYTES = 1 << 20


def check_shard(shard: Found, names: Sequence[str], manifest: Manifest | None = None) -> Iterator[str]:
    """Reads every row of a shard; yields one message for each thing that is wrong.

    `names` are the datasets of inputs and targets. Rows are compared with the recorded checksums where
    there are any; classes are counted anew; the shard is compared with its line in `manifest`.
    """
    try:
        file = ShardFile(shard.path, names)
    except DataError as error:
        yield str(error)
        return
    with file:
        if shard.entry is not None and manifest is not None:
            yield from _check_entry(file, shard.entry, manifest)
        for name in names:
            yield from _check_dataset(file, name)


def _check_entry(file: ShardFile, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    info = file.info
    beside = os.path.join(os.path.dirname(info.path), MANIFEST_NAME)
    if info.num_samples != entry.num_samples:
        yield f"{info.path}: {info.num_samples} samples, but {entry.num_samples} in {beside}."
    if entry.class_counts is not None and info.class_counts != entry.class_counts:
        yield f"{info.path}: class counts {info.class_counts}, but {entry.class_counts} in {beside}."
    for name, field in info.fields.items():
        listed = manifest.sample.fields.get(name)
        if listed is not None and listed != field:
            yield f"{info.path}: `{name}` is {field}, but {listed} in {beside}."


def _check_dataset(file: ShardFile, name: str) -> Iterator[str]:
    info = file.info
    try:
        recorded = file.checksums(name)
    except DataError as error:
        yield str(error)
        return
    block_rows = info.checksum_rows or rows_per_block(info.fields[name], _READ_BYTES)
    num_blocks = -(-info.num_samples // block_rows)
    if recorded is not None and recorded.shape != (num_blocks,):
        yield f"{info.path}: {recorded.size} checksums of `{name}`, expected {num_blocks} for its rows."
        return
    recorded_counts = info.class_counts if name == list(info.fields)[-1] else None
    counts = np.zeros(len(recorded_counts or ()), np.int64)
    damaged: list[int] = []
    unreadable = False
    for block in range(num_blocks):
        try:
            rows = file.read(name, block * block_rows, min((block + 1) * block_rows, info.num_samples))
        except DataError as error:
            unreadable = True
            yield str(error)
            continue
        if recorded is not None and checksum(rows) != int(recorded[block]):
            damaged.append(block)
        if recorded_counts is not None:
            counts += class_counts(rows, len(counts))
    for first, last in _runs(damaged):
        stop = min((last + 1) * block_rows, info.num_samples)
        yield f"{info.path}: dataset `{name}`, rows {first * block_rows} to {stop - 1}: not what was written."
    if recorded_counts is not None and not unreadable and tuple(counts.tolist()) != recorded_counts:
        yield f"{info.path}: class counts {counts.tolist()}, but {list(recorded_counts)} are recorded in it."


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring numbers as (first, last)."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs
