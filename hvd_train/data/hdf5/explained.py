"""What h5py raises for files that it cannot read, as an error that says what to do."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from hvd_train.errors import DataError, UnsupportedShard

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_NO_FILE = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_OF_THE_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO)


@contextmanager
def explained(path: str, remedy: str) -> Iterator[None]:
    """Raises `DataError` in place of what h5py raises: with `path`, the reason, and `remedy`; where it is not
    the file that is wrong, with another remedy."""
    # h5py reports a damaged file by any of these, according to which structure in it is damaged.
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected an HDF5 file that every rank can see.") from None
    except PermissionError:
        raise DataError(f"{path}: permission denied. Make the file readable for this user.") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, MemoryError, OverflowError) as error:
        reason = str(error).strip("'\"") or type(error).__name__
        number = getattr(error, "errno", None)
        if number in _TOO_MANY:
            raise UnsupportedShard(f"{path}: {_too_many_files()}") from None
        if number in _NO_FILE:
            remedy = "Expected the name of an HDF5 file that every rank can see."
        elif number in _OF_THE_DISK:
            remedy = "The disk or the file system failed: read it again; if that fails, copy the file."
        raise DataError(f"{path}: {reason}. {remedy}") from None


def _too_many_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"too many open files: a process may have {limit:,} here. Raise the limit before the start, by "
        "`ulimit -n 4096`, or have fewer files open."
    )


NOT_HDF5 = "Expected a complete HDF5 file: copy or write it again."
CHANGED = "It was damaged or changed after it was written: copy or write it again."
