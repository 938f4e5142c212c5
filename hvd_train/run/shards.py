"""Finding the shards of a data set on all ranks of a job: each header is read by one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import xxhash

from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.config import DataConfig
from hvd_train.data.catalog import Shards, join_shards, list_files
from hvd_train.data.format import SampleSpec
from hvd_train.data.growing import growing, rows_of, settled
from hvd_train.data.header_labels import HeaderLabels
from hvd_train.data.headers import HeadersRead, read_headers
from hvd_train.data.locate import Found
from hvd_train.data.places import Places
from hvd_train.data.python import registry
from hvd_train.data.python.facts import facts_of, settle
from hvd_train.data.selection import Selection, join_rows, list_rows


def find_shards_together(data: DataConfig, comm: Communicator, labels: HeaderLabels | None = None) -> Shards:
    """The shards, as `catalog.find_shards` finds them in one process: every rank lists the files, and reads
    the headers of its part of them. Collective.

    Raises `RanksDisagree` where the ranks see other files, and `SetupFailed` for what cannot be used.
    """
    registry.share_with(comm.local_size, comm.size)
    files = together(comm, lambda: list_files(data))
    read = _read_together(files.every, len(files.train), files.places, comm, labels=labels)
    found = together(comm, lambda: join_shards(files, data, read))
    return together(comm, lambda: settled(found, rows_of(found, growing(found))))


def select_rows_together(
    path: str, sample: SampleSpec, names: Sequence[str], comm: Communicator
) -> Selection:
    """The rows, as `selection.select_rows` selects them in one process. Collective. Raises as
    `find_shards_together`."""
    registry.share_with(comm.local_size, comm.size)
    listed = together(comm, lambda: list_rows(path, sample, names))
    read = _read_together(listed.files, 0, listed.places, comm, texts=True)
    return together(comm, lambda: join_rows(listed, sample, names, read))


def _read_together(
    files: Sequence[Found],
    num_train: int,
    places: Places,
    comm: Communicator,
    *,
    texts: bool = False,
    labels: HeaderLabels | None = None,
) -> list[HeadersRead]:
    """What all ranks have read of the headers, each its part. Collective."""
    _require_same(files, num_train, places, comm)
    hosts = comm.allgather(comm.host)
    first = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    ranks = range(comm.size)
    mine = together(
        comm, lambda: read_headers(files, places, comm.rank, ranks, first, texts=texts, labels=labels)
    )
    return comm.allgather(mine)


def _require_same(every: Sequence[Found], num_train: int, places: Places, comm: Communicator) -> None:
    """Raises `RanksDisagree` where the ranks see other names or sizes, before any file is opened. The folders
    may be mounted elsewhere. Collective."""
    paths = [found.path for found in every]
    together(comm, lambda: settle(paths, places))
    made = facts_of(paths)
    names = "\0".join([str(num_train), repr(made), *(os.path.basename(path) for path in paths)])
    digest = xxhash.xxh3_128_hexdigest(names.encode(errors="surrogateescape"))
    # Ranks of a host that see one file as the first share the work of asking for the sizes. A sum of hashes
    # does not depend on who asks for which.
    views = comm.allgather((comm.host, _identity(every[0].path)))
    alike = [rank for rank, view in enumerate(views) if view == views[comm.rank]]
    mine = range(alike.index(comm.rank), len(every), len(alike))
    sizes = sum(_size_hash(number, every[number]) for number in mine)
    digests, sums = zip(*comm.allgather((digest, sizes)), strict=True)
    seen = {
        sum(size for other, size in zip(views, sums, strict=True) if other == view) for view in set(views)
    }
    if len(set(digests)) > 1 or len(seen) > 1:
        known = {**_names(every, num_train), **made}
        require_equal(comm, "data", known, "Every rank must see the same files.")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # the rank that reads it says so
        return None
    return status.st_dev, status.st_ino


def _size_hash(number: int, found: Found) -> int:
    return xxhash.xxh3_64_intdigest(f"{number} {_num_bytes(found.path)}".encode())


def _names(files: Sequence[Found], num_train: int) -> dict[str, Any]:
    """What must be the same on every rank."""
    every = [(i, found.path, os.path.basename(found.path)) for i, found in enumerate(files)]
    names = {f"file {i}": name for i, _, name in every}
    sizes = {f"bytes of {name} (file {i})": _num_bytes(path) for i, path, name in every}
    return {**sizes, **names, "training files": num_train}


def _num_bytes(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:  # the rank that reads it says so
        return None
