"""Making the index of folders: reading the headers of their files, and the classes in them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import final

from hvd_train.data.format import ShardInfo
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.header_labels import counted_classes
from hvd_train.data.headers import Header, header_of
from hvd_train.data.index import IndexedFile, IndexedShard, empty_index, write_index
from hvd_train.data.locate import Found, in_groups
from hvd_train.data.places import Places
from hvd_train.errors import DataError

_SETTLED_S = 2
"""A file that was written later than this before its header was read may be written again without another
time: clocks of file systems are that coarse."""


@dataclass(frozen=True)
class Written:
    """An index that was written."""

    path: Path
    num_files: int
    """Files that it has."""
    left_out: tuple[str, ...]
    """Why it has not the others, one message each."""


def write_indexes(files: Sequence[Found], places: Places) -> Iterator[Written]:
    """Writes the index of each folder that these files are in, and yields it. Raises `DataError` for a file
    that cannot be used, and for a folder that cannot be written."""
    by_folder = sorted(files, key=lambda found: os.path.dirname(found.path))
    for folder, found in groupby(by_folder, key=lambda file: os.path.dirname(file.path)):
        yield _write(folder or ".", list(found), places)


def _write(folder: str, files: Sequence[Found], places: Places) -> Written:
    kinds, indexed, left_out = _Kinds(), dict[str, IndexedFile](), list[str]()
    for file in files:
        status = os.stat(file.path)
        headers = list(_headers(file, places))
        if status.st_mtime > time.time() - _SETTLED_S:
            left_out.append(f"{file.path}: written just now")
        elif any(header.info.growing for header in headers):
            left_out.append(f"{file.path}: a program is writing it (SWMR)")
        else:
            shards = tuple(kinds.shard(header, file.path) for header in headers)
            name = os.path.basename(file.path)
            indexed[name] = IndexedFile(size=status.st_size, time_ns=status.st_mtime_ns, shards=shards)
    index = replace(empty_index(places), kinds=tuple(kinds.infos), files=indexed)
    try:
        path = write_index(folder, index)
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written: {error.strerror}. Expected a folder that this user can "
            "write: a training reads an index beside its files only."
        ) from None
    return Written(path, len(indexed), tuple(left_out))


def _headers(file: Found, places: Places) -> Iterator[Header]:
    for shard in in_groups([file], places):
        counts: list[tuple[int, ...] | None] = []

        def count(opened: ShardFile) -> None:
            counts.append(counted_classes(opened, places.targets))  # noqa: B023

        header = header_of(shard, places, read=count)
        yield header._replace(info=replace(header.info, class_counts=counts[0]))


@final
@dataclass
class _Kinds:
    """Different headers, each once."""

    infos: list[ShardInfo] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def shard(self, header: Header, path: str) -> IndexedShard:
        """A shard of the file `path` by the number of its header."""
        info = header.info
        kind = replace(info, path="", class_counts=None, facts_digest=None)
        number = self._numbers.setdefault(repr(kind), len(self.infos))
        if number == len(self.infos):
            self.infos.append(kind)
        return IndexedShard(
            kind=number,
            group=info.path.removeprefix(path),
            class_counts=info.class_counts,
            facts_digest=info.facts_digest,
            contents=header.contents,
        )
