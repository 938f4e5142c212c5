"""What h5py raises for files that it cannot read, as an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvd_train.errors import DataError


@contextmanager
def explained(path: str, remedy: str) -> Iterator[None]:
    """Raises `DataError` in place of what h5py raises: with `path`, the reason, and `remedy`."""
    # h5py reports a damaged file by any of these, according to which structure in it is damaged.
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected an HDF5 file that every rank can see.") from None
    except PermissionError:
        raise DataError(f"{path}: permission denied. Make the file readable for this user.") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, MemoryError, OverflowError) as error:
        reason = str(error).strip("'\"") or type(error).__name__
        raise DataError(f"{path}: {reason}. {remedy}") from None


NOT_HDF5 = "Expected a complete HDF5 file: copy or write it again."
CHANGED = "It was damaged or changed after it was written: copy or write it again."
