"""Files that are there completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_train.io.output import warn
from hvd_train.liveness import mark

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}
"""Errors of a file system without fsync for folders, or for files: some of NFS, FUSE and SMB. If bytes did
not reach the disk, the error is another: EIO, ENOSPC, EDQUOT."""

_PIECE_BYTES = 64 << 20

_warned = False


@contextmanager
def replacing(path: str | Path, *, durable: bool = True, within: Path | None = None) -> Iterator[Path]:
    """Yields a temporary name next to `path`; what the body wrote there becomes `path` when it ends.

    The file's bytes and then its name are forced to disk. If the body raises, `path` stays as it was
    and the temporary file is removed. Raises OSError where the folder cannot be written.

    Args:
        durable: False for a file that carries a checksum and can be made again. It is not forced to disk,
            which takes long: it is complete however this process ends, unless the host goes down as well.
        within: a folder of the same file system for the temporary file, instead of that of `path`.
    """
    path = Path(path)
    temporary = temporary_beside(path if within is None else within / path.name)
    try:
        yield temporary
        complete(temporary, path, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new name next to `path`, for what is written over a longer time than `replacing` can be used for."""
    # Not longer than a name may be: 255 bytes on most file systems, of which a letter takes up to four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")


def complete(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Makes the file `temporary` `path`, as `replacing` does at its end. Raises OSError."""
    if durable:
        sync(temporary)
    os.replace(temporary, path)
    if durable:
        sync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Writes a file in pieces, each of which is forced to disk and is progress of this rank: all of a large
    file at once may take minutes on a slow disk. Raises OSError."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), _PIECE_BYTES):
            piece = memoryview(content)[start : start + _PIECE_BYTES]
            while piece:
                piece = piece[file.write(piece) :]
            if start + _PIECE_BYTES < len(content):
                sync(path)  # the last is forced with the file
            mark()


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk.

    On a file system that cannot do that it does nothing, with one warning for the process. Raises OSError
    where the disk reports that it failed.
    """
    global _warned
    error = refusal(path)
    if error is not None and not _warned:
        _warned = True
        warn(
            f"{path}: its file system cannot force it to disk: {error.strerror}. The files are complete "
            "unless the host, or its file server, goes down within seconds; everything else works."
        )


def refusal(path: Path) -> OSError | None:
    """Forces a file, or the names in a folder, to disk; returns the error of a file system that cannot do
    that. Raises OSError where the disk reports that it failed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError as error:
        if not path.is_dir():
            raise
        return error  # a folder may be open for writing and closed for reading
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        return error
    finally:
        os.close(descriptor)
    return None
