"""A folder with copies of shards on a disk of this host, which is that of one job and does not outlive it.

No copy is used by a later job: such disks are purged, and a copy that is made anew cannot be out of date.
Every process of the job on this host holds a shared lock on a file in the folder, which the kernel releases
when the process ends, however it ends. The last process to close the folder removes it; what is left of jobs
that were killed, the next job removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import xxhash

from hvd_train.errors import ConfigError, DataError
from hvd_train.liveness import mark

_PREFIX = "hvd_train-cache-"
_OWNERS = "owners"
_PIECE_BYTES = 16 << 20

_RESERVE = 0.05
"""Of the file system, which is left free."""

_UNOWNED_S = 600.0
"""Age from which a folder without owners is one that a job could not complete."""

_ATTEMPTS = 10


@final
class LocalFolder:
    """The job's folder, while this process uses it."""

    def __init__(self, path: Path, owners: int) -> None:
        self.path = path
        self._owners: int | None = owners

    @classmethod
    def make(cls, parent: Path) -> LocalFolder:
        """A new folder in `parent`, which is made if it is not there. Raises OSError."""
        parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            os.close(os.open(path / _OWNERS, os.O_CREAT | os.O_RDWR, 0o600))
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # taken for abandoned just now
                return cls.hold(path)
        raise OSError(f"another job removed each of {_ATTEMPTS} folders")

    @classmethod
    def hold(cls, path: Path) -> LocalFolder:
        """The folder that another process of the job has made and holds. Raises OSError."""
        owners = os.open(path / _OWNERS, os.O_RDWR)
        try:
            fcntl.flock(owners, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.stat(path / _OWNERS).st_ino != os.fstat(owners).st_ino:
                raise FileNotFoundError(f"{path} was removed")
        except BaseException:
            os.close(owners)
            raise
        return cls(path, owners)

    def close(self) -> None:
        """Removes the folder, unless other processes hold it. May be called twice."""
        if self._owners is None:
            return
        owners, self._owners = self._owners, None
        _remove_if_free(self.path, owners)


def _remove_if_free(path: Path, owners: int) -> None:
    """`owners`: its open file of locks; closed."""
    try:
        fcntl.flock(owners, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process
        return
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(owners)


def remove_abandoned(parent: Path) -> None:
    """Removes the folders of jobs of which no process is left on this host."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            owners = os.open(path / _OWNERS, os.O_RDWR)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _UNOWNED_S:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError:  # of another user
            continue
        else:
            _remove_if_free(path, owners)


def fitting(sizes: Mapping[str, int], folder: Path) -> list[str]:
    """Those of the files, by their bytes, that fit into the free space beside a reserve, in their order."""
    space = os.statvfs(folder)
    left = space.f_bavail * space.f_frsize - _RESERVE * space.f_blocks * space.f_frsize
    chosen = []
    for path, num_bytes in sizes.items():
        if num_bytes <= left:
            chosen.append(path)
            left -= num_bytes
    return chosen


def folder_of(text: str) -> Path:
    """The folder that data.cache names, with the variables of this process's environment. Raises
    `ConfigError` where one of them is not set."""
    path = os.path.expandvars(os.path.expanduser(text))
    if "$" in path:
        raise ConfigError(
            f"data.cache = {text!r}: no such variable in the environment of the ranks. Set it where they "
            "run, or name a folder."
        )
    return Path(path).absolute()


def copy(source: str, target: Path) -> None:
    """Copies a file, and compares the copy with what was read; `target` is there only once it is whole.

    Raises `DataError` if the source changes meanwhile, or if the copy is not equal, and OSError.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        with open(source, "rb") as old, part.open("w+b") as new:
            before = _state(old.fileno())
            digest = xxhash.xxh3_128()
            left = before[0]  # and no more: it may grow as fast as it is read
            while piece := old.read(min(left, _PIECE_BYTES)):
                left -= len(piece)
                digest.update(piece)
                new.write(piece)
                mark()
            new.flush()
            os.fsync(new.fileno())
            if left or _state(old.fileno()) != before:
                raise DataError(f"{source}: the file changed while it was copied. Wait until it is written.")
            # What is read back should come from the disk.
            os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            new.seek(0)
            copied = xxhash.xxh3_128()
            while piece := new.read(_PIECE_BYTES):
                copied.update(piece)
                mark()
        if copied.digest() != digest.digest():
            raise DataError(f"{source}: its copy in {target.parent} is not equal. Check that disk.")
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _state(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns
