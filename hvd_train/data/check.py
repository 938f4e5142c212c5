"""Whether shards hold what they and their manifest say. What is found here is what a training refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hvd_train.data.blocks import class_counts, rows_per_block
from hvd_train.data.crash import in_child
from hvd_train.data.format import Array, ShardInfo
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import Found
from hvd_train.data.places import Places
from hvd_train.data.verify import Verifier, describe
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import counted

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Report:
    """What was found in one shard."""

    problems: tuple[str, ...]
    """One message for each thing that is not as it was written."""

    remarks: tuple[str, ...] = ()
    """What a training takes, and a user should know."""

    info: ShardInfo | None = None
    """The header, if it could be read."""

    unlike: tuple[str, ...] = ()
    """One message for each thing for which a training would refuse this shard together with the others."""

    unsupported: tuple[str, ...] = ()
    """Why a training would refuse this shard, which need not be damaged: its rows were not read."""


def check_shards(shards: Sequence[Found], layout: Places) -> Iterator[tuple[Found, Report]]:
    """Each of the shards of one path with its `check_shard`, and compared with those before it."""
    first: ShardInfo | None = None
    for shard in shards:
        report = check_shard(shard, layout)
        info = report.info
        if info is not None and info.num_samples and not report.problems:
            first = first or info
            report = replace(report, unlike=tuple(unlike(info, first)))
        yield shard, report


def unlike(info: ShardInfo, first: ShardInfo, *, with_scale: bool = True) -> Iterator[str]:
    """One message for each thing in which samples of a shard are not what they are in `first`."""
    for name, field in info.fields.items():
        if field != first.fields[name]:
            yield (
                f"{info.path}: a sample of `{name}` is {field}, but {first.fields[name]} in "
                f"{first.path}. Expected the same in every shard: "
                "leave one of the two out, or write it again."
            )
    if with_scale and info.scale != first.scale:
        yield (
            f"{info.path}: scale {info.scale}, but {first.scale} in {first.path}. "
            "Expected the same in every shard: set data.scale, or write the shard again."
        )


def check_shard(shard: Found, layout: Places) -> Report:
    """Reads every row of a shard, in a child process, since a damaged file may end the process that reads it.

    `layout` has the fields to be read. Rows are compared with the recorded checksums where
    there are any; classes and values that are not finite are counted; the shard is compared with its line in
    the manifest.
    """
    try:
        return in_child(shard.path, lambda: _report(shard, layout))
    except UnsupportedShard as error:
        return Report((), unsupported=(str(error),))
    except DataError as error:
        return Report((str(error),))


def _report(shard: Found, layout: Places) -> Report:
    remarks: list[str] = []
    with ShardFile(shard.path, layout) as file:
        problems = list(shard.differences(file.info))
        if file.info.num_samples == 0:
            remarks.append("no samples: a training skips it")
        elif file.info.growing:
            remarks.append(f"a program is writing it (SWMR): its first {file.info.num_samples:,} rows")
        for name in layout.places:
            dataset = _DatasetCheck(file, name, is_target=name == layout.targets)
            problems += dataset.problems()
            remarks += dataset.not_finite()
    return Report(tuple(problems), tuple(remarks), file.info)


class _DatasetCheck:
    """Reads one dataset from end to end."""

    def __init__(self, file: ShardFile, name: str, *, is_target: bool) -> None:
        self._file = file
        self._name = name
        self._recorded = file.info.class_counts if is_target else None
        self._counts = np.zeros(len(self._recorded or ()), np.int64)
        self._num_not_finite = 0
        self._first_not_finite = -1

    def problems(self) -> Iterator[str]:
        """One message for each thing that is wrong."""
        info, name = self._file.info, self._name
        try:
            verifier = Verifier(self._file, name)
        except DataError as error:
            yield str(error)
            return
        block_rows = info.checksum_rows or rows_per_block(info.fields[name], _READ_BYTES)
        # Checksums are of whole rows of the dataset.
        is_part = info.checksum_rows is not None and not self._file.is_whole(name)
        damaged: list[tuple[int, int]] = []
        unreadable = False
        for block in range(-(-info.num_samples // block_rows)):
            first, last = block * block_rows, min((block + 1) * block_rows, info.num_samples)
            try:
                rows = self._file.read(name, first, last)
                stored = self._file.read_stored(name, first, last) if is_part else rows
            except UnsupportedShard:
                raise
            except DataError as error:
                unreadable = True
                yield str(error)
                continue
            if not verifier.is_good(block, stored):
                damaged.append((first, last))
            self._count(rows, first)
        for first, last in _runs(damaged):
            yield describe(info.path, name, first, last)
        recorded = self._recorded
        if recorded is not None and not unreadable and tuple(self._counts.tolist()) != recorded:
            counts = self._counts.tolist()
            yield f"{info.path}: class counts {counts}, but {list(recorded)} are recorded in it."

    def _count(self, rows: Array, first: int) -> None:
        if self._recorded is not None:
            self._counts += class_counts(rows, len(self._counts))
        if rows.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))
            if len(bad) and not self._num_not_finite:
                self._first_not_finite = first + int(bad[0])
            self._num_not_finite += int((~np.isfinite(rows[bad])).sum())

    def not_finite(self) -> Iterator[str]:
        """What to say of values that are NaN or infinite, after `problems` has read them all."""
        if self._num_not_finite:
            values = counted(self._num_not_finite, "value")
            yield (
                f"{values} of `{self._name}` not finite (NaN or infinite), the first in row "
                f"{self._first_not_finite}"
            )


def _runs(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring row ranges as one."""
    runs: list[tuple[int, int]] = []
    for first, last in ranges:
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return runs
