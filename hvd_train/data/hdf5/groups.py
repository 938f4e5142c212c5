"""The groups of a file that are shards."""

from __future__ import annotations

from contextlib import closing

import h5py

from hvd_train.data.crash import naming
from hvd_train.data.files import require_regular
from hvd_train.data.hdf5.explained import CHANGED, NOT_HDF5, explained
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.data.hdf5.links import find
from hvd_train.data.hdf5.opening import open_file
from hvd_train.data.places import Places
from hvd_train.errors import DataError


def groups_of(path: str, places: Places) -> list[str]:
    """The groups of a file that hold fields of `places`, sorted by name: of those that are in groups. Raises
    `DataError` where there are none, and for a file that cannot be read."""
    first = next(place.dataset for place in places.places.values() if place.has_groups)
    parent = [part for part in first.split("/") if part]
    parent = parent[: parent.index("*")]
    in_hdf5 = naming(path)
    with explained(path, NOT_HDF5):
        require_regular(path, "an HDF5 file")
        file = in_hdf5(open_file, path)
    linked = LinkedFiles(path, places.follow_links)
    with file, closing(linked), explained(path, CHANGED):
        groups = in_hdf5(_groups_in, file, "/".join(parent), path)
        wanted = [place for place in places.places.values() if place.has_groups]
        found = [
            g
            for g in groups
            if any(find(file, p.in_group(g).dataset, path, linked) is not None for p in wanted)
        ]
    if not found:
        raise DataError(
            f"{path}: no group with `{first}`. Expected at least one: set data.fields to what is there."
        )
    return found


def _groups_in(file: h5py.File, parent: str, path: str) -> list[str]:
    node = find(file, parent, path) if parent else file
    return sorted(node) if isinstance(node, h5py.Group) else []
