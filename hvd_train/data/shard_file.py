"""One shard: its rows, written as they arrive, and what is recorded about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import checksum, class_counts, row_bytes, rows_per_block
from hvd_train.data.facts import digest_of
from hvd_train.data.format import (
    SCHEMA_VERSION,
    Array,
    Compression,
    DatasetFacts,
    Facts,
    FieldSpec,
    ShardEntry,
    is_class_dtype,
)
from hvd_train.data.hdf5.write import ShardStream
from hvd_train.data.sources.base import INPUTS, TARGETS, Block
from hvd_train.errors import DataError
from hvd_train.io.text import counted

CHECKSUM_BYTES = 64 << 10
COMPRESSED_CHUNK_BYTES = 256 << 10
_WRITTEN_BYTES = 2 << 20
# A vocabulary beyond this would make the counts larger than many shards.
_MAX_COUNTED_CLASSES = 65_536
_MAX_LISTED_CLASSES = 1000
_NO_DIGEST = "0" * 32


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How rows are stored in a shard."""

    fields: Mapping[str, FieldSpec]
    inputs: str = INPUTS
    targets: str = TARGETS
    """The names of these fields; they may be one."""
    scale: float | None = None
    """Recorded with the inputs."""
    class_names: tuple[str, ...] = ()
    """Of the classes in the targets, in the order of their numbers; recorded in the manifest."""
    compression: Compression = "none"
    chunk_rows: int | None = None
    """None: contiguous, or about 256 KiB with compression."""

    def __post_init__(self) -> None:
        if self.scale is not None and not math.isfinite(self.scale):
            raise DataError(f"scale = {self.scale}: expected a finite number.")

    @property
    def rows_of_chunk(self) -> int | None:
        """Rows of a chunk; None for contiguous datasets."""
        if self.compression != "none" and self.chunk_rows is None:
            return rows_per_block(self.fields[self.inputs], COMPRESSED_CHUNK_BYTES)
        return self.chunk_rows

    @property
    def rows_of_checksum(self) -> int:
        """Rows of a block. Blocks end where chunks end, so that a damaged chunk is a damaged block."""
        row = sum(map(row_bytes, self.fields.values()))
        return self.rows_of_chunk or max(1, CHECKSUM_BYTES // max(1, row))


@final
class ShardBuilder:
    """A shard of `num_rows` rows that is being written to `path`, which must not exist. Every method raises
    OSError, and `DataError` for a class without a name where classes have names."""

    def __init__(self, path: Path, storage: Storage, num_rows: int) -> None:
        self._storage = storage
        self._num_rows = num_rows
        self._block = storage.rows_of_checksum
        row = max(1, sum(map(row_bytes, storage.fields.values())))
        self._written = max(1, _WRITTEN_BYTES // row // self._block) * self._block
        self._pending: list[Block] = []
        self._num_pending = 0
        self._sums: dict[str, list[int]] = {name: [] for name in storage.fields}
        self._counts = _ClassCounts(storage.fields[storage.targets])
        facts = self._facts(self._counts.result() is not None)
        chunks = storage.rows_of_chunk
        self._stream = ShardStream(path, facts, chunk_rows=chunks, compression=storage.compression)

    def append(self, block: Block) -> None:
        """Takes the next rows, [rows, ...] of every field."""
        self._pending.append(block)
        self._num_pending += _length(block)
        if self._num_pending >= self._written:
            self._write(self._num_pending // self._written * self._written)

    def finish(self) -> ShardEntry:
        """Completes the file, after the last row; returns its entry in a manifest, without a name."""
        self._write(self._num_pending)
        counts = self._counts.result()
        sums = {name: np.array(values, np.uint64) for name, values in self._sums.items()}
        all_counts = {} if counts is None else {self._storage.targets: counts}
        digest = self._stream.finish(self._facts(counts is not None, counts, sums), all_counts, sums)
        listed = tuple(counts.tolist()) if counts is not None and len(counts) <= _MAX_LISTED_CLASSES else None
        return ShardEntry(file="", num_samples=self._num_rows, class_counts=listed, facts_digest=digest)

    @property
    def num_classes(self) -> int | None:
        """Largest target so far plus one; None for targets that are no integers."""
        return self._counts.num_classes

    def abandon(self) -> None:
        """Closes a file that is not complete. May be called twice, and after `finish`."""
        self._stream.abandon()

    def _write(self, num_rows: int) -> None:
        """Writes the first `num_rows` of the rows that wait."""
        if not num_rows:
            return
        whole = self._pending[0] if len(self._pending) == 1 else _joined(self._pending)
        rows = {name: array[:num_rows] for name, array in whole.items()}
        left = self._num_pending - num_rows
        # Copied: a part of an array keeps all of it in memory.
        rest = {name: array[num_rows:].copy() for name, array in whole.items()}
        self._pending, self._num_pending = [rest] if left else [], left
        self._stream.append(rows)
        self._counts.take(rows[self._storage.targets])
        self._require_names()
        for start in range(0, num_rows, self._block):
            for name, array in rows.items():
                self._sums[name].append(checksum(array[start : start + self._block]))

    def _require_names(self) -> None:
        names, classes = self._storage.class_names, self._counts.num_classes or 0
        if names and classes > len(names):
            given = counted(len(names), "name")
            raise DataError(
                f"`{self._storage.targets}` holds {classes - 1}, but {given} of classes were given. Expected "
                f"class numbers from 0 to {len(names) - 1}: name every class."
            )

    def _facts(
        self,
        are_counted: bool,
        counts: npt.NDArray[np.int64] | None = None,
        sums: Mapping[str, npt.NDArray[np.uint64]] | None = None,
    ) -> Facts:
        """With digests of the right length where the values are not known yet."""
        of_counts = _NO_DIGEST if counts is None else digest_of(counts)
        return Facts(
            schema=SCHEMA_VERSION,
            checksum_rows=self._block,
            datasets={
                name: DatasetFacts(
                    shape=(self._num_rows, *field.shape),
                    dtype=field.dtype,
                    scale=self._storage.scale if name == self._storage.inputs else None,
                    class_counts=of_counts if name == self._storage.targets and are_counted else None,
                    checksums=_NO_DIGEST if sums is None else digest_of(sums[name]),
                )
                for name, field in self._storage.fields.items()
            },
        )


class _ClassCounts:
    """How many values there are of each class."""

    def __init__(self, field: FieldSpec) -> None:
        self._is_counted = is_class_dtype(field.dtype)
        self._largest = 0
        self._counts = np.zeros(1, np.int64)

    @property
    def num_classes(self) -> int | None:
        return self._largest + 1 if self._is_counted else None

    def take(self, targets: Array) -> None:
        if not self._is_counted:
            return
        self._largest = max(self._largest, int(targets.max(initial=0)))
        if self._largest < _MAX_COUNTED_CLASSES:
            counts = class_counts(targets, self._largest + 1)
            counts[: len(self._counts)] += self._counts
            self._counts = counts

    def result(self) -> npt.NDArray[np.int64] | None:
        """[classes]; None for targets that are not counted."""
        counted = self._is_counted and self._largest < _MAX_COUNTED_CLASSES
        return self._counts if counted else None


def _joined(blocks: list[Block]) -> Block:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _length(block: Block) -> int:
    return len(next(iter(block.values())))
