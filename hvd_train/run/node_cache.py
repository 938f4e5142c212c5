"""Copies of the ranks' shards on disks of their hosts: each file once a host, shared by its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.data.local_copy import PREFIX, copy, fitting, folder_of
from hvd_train.errors import ConfigError, DataError
from hvd_train.io.held_folder import HeldFolder, remove_abandoned
from hvd_train.io.output import warn
from hvd_train.io.text import counted
from hvd_train.liveness import phase


@dataclass(frozen=True)
class Copies:
    """Of the files that a rank reads."""

    paths: Mapping[str, str] = field(default_factory=dict)
    """The copy of each file that has one."""

    words: str = ""
    """How many there are, as the end of a sentence."""


@contextmanager
def node_cache(comm: Communicator, cache: str, files: Sequence[str]) -> Iterator[Copies]:
    """Copies of `files`, which this rank reads, in a folder of the job under `cache`, as far as there is room
    for them; rank 0 warns of the others. None if `cache` is empty. They are removed at the end. To enter is
    collective, to leave is not.

    Raises `SetupFailed` where a rank cannot use `cache`, and where a file changes while it is copied.
    """
    if not cache:
        yield Copies()
        return
    phase("copying data")
    needs = comm.allgather((comm.host, tuple(files)))
    ranks = [rank for rank, (host, _) in enumerate(needs) if host == comm.host]
    wanted = list(dict.fromkeys(file for rank in ranks for file in needs[rank][1]))
    leads = comm.rank == ranks[0]
    with ExitStack() as stack:
        made = together(comm, lambda: _make(cache, wanted, stack) if leads else None)
        plan = comm.allgather(made)[ranks[0]]
        assert plan is not None  # the first rank of every host has made one
        folder, chosen = plan
        together(comm, lambda: None if leads else _hold(cache, folder, stack))
        mine = chosen[ranks.index(comm.rank) :: len(ranks)]
        done = comm.allgather(together(comm, lambda: _copy(mine, chosen, folder)))
        copies = {file: path for rank in ranks for file, path in done[rank].items()}
        _warn(comm, cache, wanted, copies, leads)
        paths = {file: copies[file] for file in files if file in copies}
        yield Copies(paths, f"; {len(paths)} of {counted(len(files), 'file')} copied to {cache}")


def _make(cache: str, wanted: Sequence[str], stack: ExitStack) -> tuple[Path, list[str]]:
    """A new folder, which is closed with `stack`, and which of the files there is room for."""
    parent = folder_of(cache)
    try:
        remove_abandoned(parent, PREFIX)
        folder = HeldFolder.make(parent, PREFIX)
    except OSError as error:
        raise _unusable(cache, error) from None
    stack.callback(folder.close)
    try:
        return folder.path, fitting({file: os.stat(file).st_size for file in wanted}, folder.path)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}. Every rank must see its shards.") from None


def _hold(cache: str, path: Path, stack: ExitStack) -> None:
    try:
        stack.callback(HeldFolder.hold(path).close)
    except OSError as error:
        raise _unusable(cache, error) from None


def _unusable(cache: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"data.cache = {cache!r}: {error.strerror or error}. Expected a folder on a disk of the host, with "
        "locks, in which this user can write: name one, or leave data.cache out."
    )


def _copy(mine: Sequence[str], chosen: Sequence[str], folder: Path) -> dict[str, str]:
    """The copies that this rank made. A file for which there is no room after all is left out."""
    copies = {}
    for file in mine:
        target = folder / f"{chosen.index(file):05d}-{os.path.basename(file)}"
        try:
            copy(file, target)
        except OSError:
            continue
        copies[file] = str(target)
    return copies


def _warn(
    comm: Communicator, cache: str, wanted: Sequence[str], copies: Mapping[str, str], leads: bool
) -> None:
    """One line for all hosts. Collective."""
    without = [file for file in wanted if file not in copies] if leads else []
    lines = [
        f"{host}: {count} of {counted(total, 'file')}, the first is {first[0]}"
        for host, count, total, first in comm.allgather((comm.host, len(without), len(wanted), without[:1]))
        if count
    ]
    if lines and comm.rank == 0:
        more = f" (and on {counted(len(lines) - 1, 'more host')})" if len(lines) > 1 else ""
        warn(f"data.cache = {cache!r} has no room on {lines[0]}{more}. They are read from where they are.")
