"""Copies of shards on a disk of this host, in a `HeldFolder` of one job that does not outlive it.

No copy is used by a later job: such disks are purged, and a copy that is made anew cannot be out of date.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import xxhash

from hvd_train.errors import ConfigError, DataError
from hvd_train.liveness import mark

PREFIX = "hvd_train-cache-"
"""Of the name of a job's folder."""

_PIECE_BYTES = 16 << 20

_RESERVE = 0.05
"""Of the file system, which is left free."""


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
