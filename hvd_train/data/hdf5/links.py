"""Opening an HDF5 file, and finding a dataset in it without leaving the file.

A shard is data, not a program: links that leave the file, virtual datasets and external storage are
refused, so that reading a shard opens that one file and no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from hvd_train.data import format as fmt
from hvd_train.data.hdf5.types import numpy_dtype
from hvd_train.errors import DataError

_MAX_LISTED = 12
_MAX_SOFT_LINKS = 16


def open_file(path: str | Path) -> h5py.File:
    # Shards are never changed in place (they are renamed into being), so a reader needs no lock, and
    # asking for one fails on parallel file systems that are mounted without flock. The argument is
    # used and not HDF5_USE_FILE_LOCKING, which child processes and other libraries would inherit;
    # where a site sets that variable, it wins.
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # A user's own code in this process has the file open, with locks; HDF5 allows no mixture.
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")


def open_dataset(file: h5py.File, name: str, path: str) -> h5py.Dataset:
    dataset = find(file, name, path)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(
            f"{path}: no dataset `{name}`; {_listing(file)}. "
            "Set data.inputs and data.targets to the names of the datasets of inputs and targets."
        )
    if dataset.is_virtual or dataset.external:
        kind = "is virtual" if dataset.is_virtual else "has external storage"
        raise DataError(
            f"{path}: dataset `{name}` {kind}: its values are in other files. "
            "Expected them in this file: copy it with h5repack."
        )
    if not dataset.shape:
        raise DataError(f"{path}: dataset `{name}` is a single value. Expected samples along its first axis.")
    return dataset


def find(file: h5py.File, name: str, path: str = "") -> h5py.Dataset | h5py.Group | None:
    """The object at `name`. Links are followed by hand: opening an external one would open its file."""
    parts = [part for part in name.split("/") if part]
    group: Any = file
    done: list[str] = []
    soft_links = 0
    while parts:
        part = parts.pop(0)
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{path or file.filename}: `{name}` is an external link to {link.filename}:{link.path}. "
                "Expected the dataset in this file: copy it here, or name the other file as the shard."
            )
        if isinstance(link, h5py.SoftLink):
            soft_links += 1
            if soft_links > _MAX_SOFT_LINKS:
                raise DataError(
                    f"{path or file.filename}: `{name}` is a cycle of soft links. Remove one of them."
                )
            absolute = link.path.startswith("/")
            parts = [p for p in ([] if absolute else done) + link.path.split("/") + parts if p and p != "."]
            group, done = file, []
        elif isinstance(link, h5py.HardLink):
            group = group[part]
            done.append(part)
        else:
            return None
    return group


def _listing(file: h5py.File) -> str:
    found: list[str] = []

    def collect(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith(fmt.GROUP + "/"):
            dtype = numpy_dtype(node.id.get_type())
            found.append(f"`{name}` {list(node.shape or ())} {dtype}")

    file.visititems(collect)
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return "the file has " + (", ".join(found[:_MAX_LISTED]) + more if found else "no datasets")
