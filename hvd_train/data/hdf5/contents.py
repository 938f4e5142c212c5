"""What an HDF5 file has, in words: for the message about a dataset that it does not have."""

from __future__ import annotations

from collections import deque
from typing import Any

import h5py

from hvd_train.data import format as fmt
from hvd_train.data.hdf5.types import numpy_dtype
from hvd_train.io.text import shown

_MAX_LISTED = 12
_MAX_OPENED = 2000
"""A file may have millions of objects, and groups in groups of any depth."""
_SORTED_LINKS = 10_000
"""Of a group with more links HDF5 would sort all names to give the first ones in order."""

_INDEXES = b"_i_"
"""Of the groups in which PyTables has the indexes of a table."""


def contents(file: h5py.File) -> str:
    """`the file has` and its datasets, the nearest to the root first, without those that hvd_train adds to
    its shards. Links are not followed."""
    texts, num_found, complete = _datasets(file)
    among = "" if complete else f", among its first {_MAX_OPENED:,} objects"
    rest = num_found - len(texts)
    more = f" and {rest:,} more" if rest else ""
    return f"the file has {', '.join(texts) or 'no datasets'}{more}{among}"


def _datasets(file: h5py.File) -> tuple[list[str], int, bool]:
    """The first datasets in words, the number of those found, and whether the whole file was searched.

    Goes through the groups in breadth: h5py's `visititems` takes minutes for groups that are 5000 deep.
    """
    texts: list[str] = []
    num_found = num_opened = 0
    root = file["/"].id
    groups, seen = deque([(b"", root)]), {root}
    while groups:
        path, group = groups.popleft()
        for name, is_external in _links(group, _MAX_OPENED - num_opened + 1):
            if (not path and name == fmt.GROUP.encode()) or name.startswith(_INDEXES):
                continue
            if num_opened == _MAX_OPENED:
                return texts, num_found, False
            num_opened += 1
            if is_external:
                num_found += 1
                if len(texts) < _MAX_LISTED:
                    texts.append(f"`{_shown(path + name)}` (an external link)")
                continue
            node = h5py.h5o.open(group, name)
            if isinstance(node, h5py.h5d.DatasetID):
                num_found += 1
                if len(texts) < _MAX_LISTED:
                    texts.append(_describe(path + name, node))
            elif isinstance(node, h5py.h5g.GroupID) and node not in seen:
                seen.add(node)
                groups.append((path + name + b"/", node))
    return texts, num_found, True


def _links(group: Any, most: int) -> list[tuple[bytes, bool]]:
    """The names of the first links of a group that are not soft, and whether they are external."""
    names: list[tuple[bytes, bool]] = []

    def take(name: bytes, link: Any) -> bool | None:
        if link.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_EXTERNAL):
            names.append((name, link.type == h5py.h5l.TYPE_EXTERNAL))
        return True if len(names) >= most else None  # None goes on to the next link

    order = h5py.h5.ITER_INC if group.get_num_objs() <= _SORTED_LINKS else h5py.h5.ITER_NATIVE
    group.links.iterate(take, order=order, info=True)
    return names


def _shown(path: bytes) -> str:
    return shown(path.decode(errors="backslashreplace"))


def _describe(path: bytes, node: Any) -> str:
    dataset = h5py.Dataset(node)
    # To find the shape of a virtual one, HDF5 may open other files.
    shape = "virtual" if dataset.is_virtual else list(dataset.shape or ())
    text = f"`{_shown(path)}` {shape} {numpy_dtype(node.get_type())}"
    try:
        path.decode()
    except UnicodeDecodeError:
        text += f" (not UTF-8: rename it by `file.id.links.move({path!r}, file.id, b'NAME')`)"
    return text
