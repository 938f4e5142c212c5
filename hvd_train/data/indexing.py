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
from hvd_train.data.header_labels import counted_classes
from hvd_train.data.headers import Header, header_of
from hvd_train.data.index import IndexedFile, empty_index, not_indexed, write_index
from hvd_train.data.locate import Found
from hvd_train.data.places import Places
from hvd_train.errors import DataError

_SETTLED_S = 2
"""A file that was written later than this before its header is read may be written again without another
time, as clocks of file systems are coarse: it is waited for that long."""


@dataclass(frozen=True)
class Written:
    """An index that was written."""

    path: Path
    num_files: int
    """Files that it has."""
    left_out: tuple[str, ...]
    """Why it has not the others, one message each."""


def write_indexes(files: Sequence[Found], places: Places) -> Iterator[Written]:
    """Writes the index of each folder that these files are in, and yields it. Raises `DataError` for fields
    that have no index, a file that cannot be used, and a folder that cannot be written."""
    if reason := not_indexed(places):
        raise DataError(f"{files[0].path}: such files have no index, as {reason}. Train without one.")
    by_folder = sorted(files, key=lambda found: os.path.dirname(found.path))
    for folder, found in groupby(by_folder, key=lambda file: os.path.dirname(file.path)):
        yield _write(folder or ".", list(found), places)


def _write(folder: str, files: Sequence[Found], places: Places) -> Written:
    kinds, indexed, left_out = _Kinds(), dict[str, IndexedFile](), list[str]()
    for file in files:
        status = _settled(file.path)
        header = _header(file, places)
        if status is None:
            left_out.append(f"{file.path}: it is being written, or its time is in the future")
        elif header.info.growing:
            left_out.append(f"{file.path}: a program is writing it (SWMR)")
        else:
            indexed[os.path.basename(file.path)] = kinds.file(header, status.st_size, status.st_mtime_ns)
    index = replace(empty_index(places), kinds=tuple(kinds.infos), files=indexed)
    try:
        path = write_index(folder, index)
    except OSError as error:
        raise DataError(
            f"{folder}: the index cannot be written: {error.strerror}. Expected a folder that this user can "
            "write: a training reads an index beside its files only."
        ) from None
    return Written(path, len(indexed), tuple(left_out))


def _settled(path: str) -> os.stat_result | None:
    """Size and time of a file, once they tell whether it is written again; None if they do not."""
    for _ in range(2):
        try:
            status = os.stat(path)
        except OSError:  # who opens it says so
            return None
        wait_s = status.st_mtime + _SETTLED_S - time.time()
        if wait_s <= 0:
            return status
        if wait_s > _SETTLED_S:  # of the future, by whatever clock: many files would be waited for one by one
            return None
        time.sleep(wait_s)
    return None


def _header(file: Found, places: Places) -> Header:
    counts: list[tuple[int, ...] | None] = []
    header = header_of(
        file, places, read=lambda opened: counts.append(counted_classes(opened, places.targets))
    )
    return header._replace(info=replace(header.info, class_counts=counts[0]))


@final
@dataclass
class _Kinds:
    """Different headers, each once."""

    infos: list[ShardInfo] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def file(self, header: Header, size: int, time_ns: int) -> IndexedFile:
        """A file of this size and time by the number of its header."""
        info = header.info
        kind = replace(info, path="", class_counts=None, facts_digest=None)
        number = self._numbers.setdefault(repr(kind), len(self.infos))
        if number == len(self.infos):
            self.infos.append(kind)
        return IndexedFile(
            size=size,
            time_ns=time_ns,
            kind=number,
            class_counts=info.class_counts,
            facts_digest=info.facts_digest,
            contents=header.contents,
        )
