"""Opening an HDF5 file."""

from __future__ import annotations

from pathlib import Path

import h5py

from hvd_train.data.hdf5.signatures import other_format
from hvd_train.errors import UnsupportedShard


def open_file(path: str | Path) -> h5py.File:
    """A file that a program writes in SWMR mode (single writer, multiple readers) is read in that mode; what
    it has is what it has now, until it is closed.

    Raises `UnsupportedShard` for a file of another format, or one that is marked or locked by a program that
    writes it in any other mode, and whatever h5py raises."""
    # Shards are never changed in place (they are renamed into being), so a reader needs no lock, and
    # asking for one fails on parallel file systems that are mounted without flock. The argument is
    # used and not HDF5_USE_FILE_LOCKING, which child processes and other libraries would inherit;
    # where a site sets that variable, it wins.
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = str(error)
        # In HDF5's advice on the mark of formats since 1.10; or, of a file that this process has open so.
        if "h5clear" in reason or "SWMR read access" in reason:
            return _open_swmr(path)
        if "unable to lock file" in reason:
            raise UnsupportedShard(f"{path}: {reason}. {_LOCKED}") from None
        if "signature" in reason and (other := other_format(path)):
            raise UnsupportedShard(f"{path}: {other}") from None
        # A user's own code in this process has the file open, with locks; HDF5 allows no mixture.
        if "locking flag" not in reason:
            raise
        return h5py.File(path, "r")


def is_swmr(dataset: h5py.Dataset) -> bool:
    """Whether its file is open in SWMR mode. h5py would make an object for the file to tell."""
    return bool(h5py.h5i.get_file_id(dataset.id).get_intent() & h5py.h5f.ACC_SWMR_READ)


def _open_swmr(path: str | Path) -> h5py.File:
    """A file that a program writes in a way that others may read meanwhile."""
    try:
        return h5py.File(path, "r", swmr=True, locking=False)
    except OSError:
        raise UnsupportedShard(f"{path}: {_MARKED}") from None


_MARKED = (
    "marked as being written: a program writes it now, or was killed before it closed it. Expected a "
    "complete HDF5 file: wait for that program. If it was killed, remove the mark by `h5clear --status "
    "--increment=0 FILE`; the file then has the rows of the last flush."
)
_LOCKED = (
    "HDF5_USE_FILE_LOCKING asks for a lock: a program writes the file, or its file system has no locks. Wait "
    "for that program, or set HDF5_USE_FILE_LOCKING=FALSE."
)
