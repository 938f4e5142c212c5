"""Where the rows of a dataset are in its file, for reading them without the HDF5 library."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from hvd_train.data.places import Cut

_OTHERWISE = "Read it with data.reading = 'stream', or 'memory'"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A dataset that is one piece of its file, one row after the other."""

    offset: int
    """Of the first row, in bytes from the start of the file."""

    shape: tuple[int, ...]
    """Rows first."""

    dtype: np.dtype[Any]
    """Of the values as they are stored, with their byte order."""

    cut: Cut
    """What is read of each axis but the first."""

    @property
    def stop(self) -> int:
        """The first byte after the last row."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Why rows cannot be read without the HDF5 library."""

    reason: str
    """The end of a sentence that begins with the dataset."""

    remedy: str
    """A sentence."""


def extent_of(dataset: h5py.Dataset, path: str, dtype: np.dtype[Any], cut: Cut) -> Extent | Obstacle:
    """Where a dataset is whose rows are along the first axis.

    Args:
        path: of its file.
        dtype: in which the HDF5 library reads its values.
        cut: what is read of each axis but the first.
    """
    layout = dataset.id.get_create_plist().get_layout()
    if layout != h5py.h5d.CONTIGUOUS:
        return Obstacle(reason=_storage(dataset, layout), remedy=_contiguous(path))
    kind = dataset.id.get_type()
    stored = _same(kind, dtype)
    if stored is None:
        return Obstacle(reason="holds values that are converted as they are read", remedy=f"{_OTHERWISE}.")
    offset = dataset.id.get_offset()
    if offset is None:
        return Obstacle(reason="was never written", remedy=f"{_OTHERWISE}.")
    return Extent(offset=int(offset), shape=tuple(map(int, dataset.shape)), dtype=stored, cut=cut)


def converted(what: str) -> Obstacle:
    """Of values that are computed from those in the file; `what` says how, as `Obstacle.reason`."""
    return Obstacle(reason=what, remedy=f"{_OTHERWISE}.")


def _same(kind: Any, dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype with the byte order of the file; None if the values in the file are no such numbers."""
    stored: np.dtype[Any]
    for stored in (dtype.newbyteorder("<"), dtype.newbyteorder(">")):
        if h5py.h5t.py_create(stored, logical=True).equal(kind):
            return stored
        if kind.get_class() == h5py.h5t.ENUM and h5py.h5t.py_create(stored).equal(kind.get_super()):
            return stored
    return None


def _storage(dataset: h5py.Dataset, layout: int) -> str:
    if layout == h5py.h5d.CHUNKED:
        filtered = dataset.id.get_create_plist().get_nfilters() > 0
        return "is compressed" if filtered else "is stored in chunks"
    return "is not stored as one piece of the file"


def _contiguous(path: str) -> str:
    return (
        f"Write it as one piece, `h5repack -f NONE -l CONTI {shlex.quote(path)} repacked.h5`, or choose "
        "data.reading = 'stream'."
    )
