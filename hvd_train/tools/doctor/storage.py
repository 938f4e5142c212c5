"""The folder of the runs: can it be written, does it have locks, which file system is it."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_train.environment.machine import file_system
from hvd_train.io.atomic import refusal
from hvd_train.tools.doctor.check import Check, ranks, size

if TYPE_CHECKING:  # it loads torch
    from hvd_train.comm.base import Communicator

_LITTLE_BYTES = 1 << 30

_LOCKING = "HDF5_USE_FILE_LOCKING"


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def runs_folder(runs: Path, root: Path = Path("/")) -> Check:
    """Whether a run can be written there: files, the renaming of a folder, and both forced to disk."""
    name = "runs"
    folder = existing(runs)
    seen = f"{runs.absolute()} on {file_system(folder, root)}"
    try:
        refused = _write_as_a_checkpoint(folder)
        free = os.statvfs(folder)
    except OSError as error:
        remedy = "Choose another folder by --runs."
        seen = f"{seen}, which cannot be written: {error.strerror}"
        return Check(name=name, status="error", seen=seen, remedy=remedy)
    free_bytes = free.f_bavail * free.f_frsize
    if free_bytes < _LITTLE_BYTES:
        seen, remedy = (
            f"{seen}, which has only {size(free_bytes)} free",
            "Make room, or choose another --runs.",
        )
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    if refused is not None:
        seen = f"{seen}, which cannot force a folder or its files to disk: {refused.strerror}"
        remedy = "Training works. If the file server goes down, the newest checkpoint may be lost: keep more."
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    return Check(name=name, seen=seen)


def _write_as_a_checkpoint(folder: Path) -> OSError | None:
    """Writes a file into a new folder, renames the folder and forces both to disk; returns the error of a
    file system that cannot do the last. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".hvd_train.doctor.") as made:
        before, after = Path(made, "before"), Path(made, "after")
        before.mkdir()
        (before / "file").write_bytes(b"a checkpoint")
        before.replace(after)
        return refusal(after / "file") or refusal(after)


def file_locking(runs: Path, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Check:
    """Whether files there can be locked, as HDF5 does unless configured not to. This program reads shards
    without locks, and writes them with locks where there are some."""
    name = "HDF5 locks"
    folder = existing(runs)
    value = environ.get(_LOCKING)
    setting = f"{_LOCKING} is {'not set' if value is None else repr(value)}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            return Check(name=name, seen=f"nothing can be written in {folder}; {setting}")
        seen = f"flock fails on {file_system(folder, root)}: {error.strerror}; {setting}"
        if value is not None and value.upper() in ("FALSE", "0"):
            return Check(name=name, seen=seen)
        remedy = f"Shards are read without locks. For a task's own h5py: `export {_LOCKING}=FALSE`."
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    return Check(name=name, seen=f"flock works on {file_system(folder, root)}; {setting}")


def seen_by_all(comm: Communicator, runs: Path) -> Check | None:
    """Whether a file that rank 0 makes in the folder of the runs is there for every rank; None if it cannot
    make one, which `runs_folder` reports. Collective."""
    name = "shared runs"
    file = None
    if comm.rank == 0:
        try:
            file = tempfile.NamedTemporaryFile(dir=existing(runs), prefix=".hvd_train.doctor.")  # noqa: SIM115
        except OSError:
            file = None
    path = comm.broadcast(file.name if file else "")
    there = comm.allgather(bool(path) and Path(path).exists())
    if file:
        file.close()
    if not path:
        return None
    blind = [rank for rank, sees in enumerate(there) if not sees]
    if not blind:
        return Check(name=name, seen=f"every rank sees what rank 0 writes in {Path(path).parent}")
    seen = f"what rank 0 writes in {Path(path).parent} is not visible on {ranks(blind)}"
    remedy = "Choose a folder that every host mounts under the same name, by --runs."
    return Check(name=name, status="error", seen=seen, remedy=remedy)
