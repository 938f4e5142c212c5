"""Writing one HDF5 file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, final

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data import format as fmt
from hvd_train.data.facts import digest, encode
from hvd_train.data.h5 import Array


def write_file(
    path: Path,
    datasets: Mapping[str, Array],
    facts: fmt.Facts,
    *,
    chunk_rows: int | None,
    compression: Literal["none", "gzip"],
    class_counts: Mapping[str, npt.NDArray[np.int64]],
    checksums: Mapping[str, npt.NDArray[np.uint64]],
) -> str:
    """Writes one shard to `path`, which must not exist; returns the digest of its facts.

    `datasets` are arrays [rows, ...] of equal length. `chunk_rows` None with no compression gives contiguous
    datasets. The bytes are a function of the arguments alone. Raises OSError.
    """
    with _create(path, (fmt.GROUP, fmt.CHECKSUMS, fmt.CLASS_COUNTS)) as file:
        text = encode(facts)
        file.attrs[fmt.ATTR_SCHEMA] = facts.schema
        # Of fixed length: HDF5 has checksums for what is stored in a header, but not for its heap of strings.
        file.attrs[fmt.ATTR_FACTS] = np.bytes_(text)
        file.attrs[fmt.ATTR_FACTS_DIGEST] = np.bytes_(digest(text))
        for name, array in datasets.items():
            chunks = None if chunk_rows is None else (min(chunk_rows, len(array)), *array.shape[1:])
            file.create_dataset(
                name,
                data=array,
                chunks=chunks,
                compression=None if compression == "none" else compression,
                shuffle=compression != "none" and array.dtype.itemsize > 1,
                track_times=False,
            )
        for group, arrays in ((fmt.CHECKSUMS, checksums), (fmt.CLASS_COUNTS, class_counts)):
            for name, array in arrays.items():
                file.create_dataset(f"{group}/{name}", data=array, track_times=False)
    return digest(text)


@final
class RowWriter:
    """A new file of contiguous datasets [num_rows, ...], whose rows are written in order. Every method raises
    OSError.

    Args:
        path: must not exist.
        fields: the datasets; in native byte order, or `S12` for strings of UTF-8 in 12 bytes.
        attributes: of the file.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, fmt.FieldSpec],
        num_rows: int,
        attributes: Mapping[str, str | int],
    ) -> None:
        self._file = _create(path)
        self._file.attrs.update(attributes)
        self._row = 0
        for name, field in fields.items():
            text = field.dtype.startswith("S")
            dtype = h5py.string_dtype("utf-8", int(field.dtype[1:])) if text else np.dtype(field.dtype)
            self._file.create_dataset(name, (num_rows, *field.shape), dtype, track_times=False)

    def append(self, rows: Mapping[str, Array]) -> None:
        """Writes the next rows, the same number to every dataset."""
        stop = self._row
        for name, array in rows.items():
            dataset = self._file[name]
            stop = self._row + len(array)
            if array.size:
                dataset.write_direct(array.view(dataset.dtype), dest_sel=np.s_[self._row : stop])
        self._row = stop

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        self._file.close()


def _create(path: Path, groups: Sequence[str] = ()) -> h5py.File:
    # The format of HDF5 1.8 (2008): the oldest in which headers, links and attributes have checksums.
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    # best-effort: a lock keeps two writers apart where the file system has locks, and is not required.
    access.set_file_locking(True, True)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    file = h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_EXCL, creation, access))
    untimed = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    untimed.set_obj_track_times(False)
    for group in groups:
        h5py.h5g.create(file.id, group.encode(), gcpl=untimed)
    return file
