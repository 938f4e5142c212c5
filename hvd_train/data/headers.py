"""The headers of many shards: each is read by one rank, and put together on all."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import xxhash

from hvd_train.data.format import ShardInfo
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.hdf5.selections import Stretch
from hvd_train.data.header_labels import HeaderLabels
from hvd_train.data.index import Indexes, lines
from hvd_train.data.locate import Found, in_groups
from hvd_train.data.places import Places
from hvd_train.data.python.registry import made_of
from hvd_train.data.python.shard import header_of as header_of_samples
from hvd_train.data.repeats import Origin
from hvd_train.errors import DataError


class Header(NamedTuple):
    """What one shard says of itself."""

    info: ShardInfo
    """Its path is what follows the name of its file: folders may be mounted elsewhere on another host."""

    contents: str
    """A hash of the recorded checksums of its rows; empty without them."""

    stretches: tuple[Stretch, ...] = ()
    """Where its inputs are, in whatever file; empty unless links are followed."""


@dataclass(frozen=True, kw_only=True)
class HeadersRead:
    """What one rank has read. Equal parts are one object, so that it is small when it is pickled."""

    shards: Mapping[int, tuple[Header, ...]]
    """By the number of the file: its shards."""

    files: Mapping[int, Hashable]
    """By the number of the file: what identifies it, whatever its name."""

    error: tuple[int, DataError] | None = None
    """The first file that cannot be used, and why."""

    outdated: Mapping[str, int] = field(default_factory=dict)
    """Files that are not as an index records them, by its path."""

    unusable: Sequence[str] = ()
    """Why indexes are not used, one message each."""


def read_headers(
    files: Sequence[Found],
    places: Places,
    rank: int = 0,
    ranks: Sequence[int] = (0,),
    neighbours: Sequence[int] = (0,),
    *,
    texts: bool = False,
    labels: HeaderLabels | None = None,
) -> HeadersRead:
    """Reads the headers of this rank's files: of p ranks, the one at place i takes files i, i + p, ...

    Args:
        rank: this one.
        ranks: all that share the reading.
        neighbours: those of one host, which find out which names lead to the same file: the numbers by which
            a file system knows a file mean nothing on another host.
        texts: whether datasets may hold strings of a fixed number of bytes.
        labels: reads labels while a file is open; None: no values are read.

    Not collective. Raises nothing of what a file causes.
    """
    shards: dict[int, tuple[Header, ...]] = {}
    error: tuple[int, DataError] | None = None
    like: Header | None = None
    indexes = Indexes(places)
    for number in _part(files, rank, ranks):
        try:
            found = []
            for header in _headers(files[number], places, texts, labels, indexes):
                like = _alike(header, files[number], like)
                found.append(like)
            shards[number] = tuple(found)
        except DataError as reason:
            error = (number, reason)
            break
    return HeadersRead(
        shards=shards,
        files=_identities(files, rank, neighbours),
        error=error,
        outdated=indexes.outdated,
        unusable=indexes.unusable,
    )


def index_lines(files: Sequence[Found], read: Sequence[HeadersRead]) -> list[str]:
    """What a user should know of the indexes of the files, by what all ranks have read, one line each."""
    outdated: dict[str, int] = {}
    for part in read:
        for path, count in part.outdated.items():
            outdated[path] = outdated.get(path, 0) + count
    return lines(outdated, [line for part in read for line in part.unusable], len(files))


def _headers(
    file: Found, places: Places, texts: bool, labels: HeaderLabels | None, indexes: Indexes
) -> Iterator[Header]:
    """Those of the shards of a file: from its index, if that has it, as listed, and no labels are to be
    read."""
    if made := made_of(file.path):
        yield Header(header_of_samples(made, places), "")
        return
    indexed = indexes.header(file.path)
    if indexed is not None:
        info = indexed[0].renamed(file.path)
        if not any(file.differences(info)) and not (labels is not None and labels.covers_any(info)):
            yield Header(info, indexed[1])
            return
    for shard in in_groups([file], places):
        yield header_of(shard, places, texts=texts, read=labels.read if labels else None)


def join_headers(files: Sequence[Found], read: Sequence[HeadersRead]) -> list[list[tuple[ShardInfo, Origin]]]:
    """The shards of each file, by what all ranks have read. Raises the `DataError` of the first file that one
    of them could not use."""
    errors = [part.error for part in read if part.error is not None]
    if errors:
        raise min(errors, key=lambda error: error[0])[1]
    shards = {number: found for part in read for number, found in part.shards.items()}
    identities = {number: known for part in read for number, known in part.files.items()}
    folders = {folder: os.path.realpath(folder) for folder in set(map(_folder_of_manifest, files)) if folder}
    joined = []
    for number, file in enumerate(files):
        manifest = folders.get(_folder_of_manifest(file), "")
        of_file = []
        for info, contents, stretches in shards[number]:
            path = file.path + info.path
            known = (identities.get(number, path), info.path)
            origin = Origin(path=path, file=known, contents=contents, manifest=manifest, stretches=stretches)
            of_file.append((info.renamed(path), origin))
        joined.append(of_file)
    return joined


def _folder_of_manifest(file: Found) -> str:
    return file.path.removesuffix(file.entry.file) if file.entry else ""


def _part(files: Sequence[Found], rank: int, ranks: Sequence[int]) -> range:
    if rank not in ranks:
        return range(0)
    return range(ranks.index(rank), len(files), len(ranks))


def _identities(files: Sequence[Found], rank: int, ranks: Sequence[int]) -> dict[int, Hashable]:
    found: dict[int, Hashable] = {}
    for number in _part(files, rank, ranks):
        try:
            status = os.stat(files[number].path)
        except OSError:  # the rank that reads it says so
            continue
        found[number] = (status.st_dev, status.st_ino)
    return found


def header_of(
    shard: Found,
    places: Places,
    *,
    texts: bool = False,
    read: Callable[[ShardFile], None] | None = None,
) -> Header:
    """The header of a shard, which is what its manifest says. Raises `DataError`.

    Args:
        read: called while the file is open.
    """
    with ShardFile(shard.path, places, texts=texts) as file:
        info = file.info
        digests = [file.checksums_digest(name) for name in info.fields]
        stretches = tuple(file.stretches(places.inputs))
        for difference in shard.differences(info):
            raise DataError(difference)
        if read is not None:
            read(file)
    if not all(digests):
        return Header(info, "", stretches)
    known = repr((info.num_samples, info.checksum_rows, list(info.fields.items()), digests))
    return Header(info, xxhash.xxh3_128_hexdigest(known.encode()), stretches)


def _alike(header: Header, file: Found, like: Header | None) -> Header:
    """The header without the name of its file, and with the parts that are equal in `like` taken from it."""
    info = header.info.renamed(header.info.path.removeprefix(file.path))
    if like is None:
        return header._replace(info=info)
    if info == like.info and header[1:] == like[1:]:
        return like
    same = {
        name: getattr(like.info, name)
        for name in ("fields", "layouts", "class_counts", "unpacked")
        if getattr(info, name) == getattr(like.info, name)
    }
    return header._replace(info=replace(info, **same))
