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
from hvd_train.data.format import Array


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
    """A new file of contiguous datasets [num_rows, ...], whose rows are written in order.

    HDF5 writes the headers and reserves the space; the rows are written to it without HDF5. On a full disk
    HDF5 would keep values that it cannot write, and fail again whenever it is called, even at the end of the
    process. Every method raises OSError.

    Args:
        path: must not exist.
        fields: the datasets; `S12` stands for strings of UTF-8 in 12 bytes.
        attributes: of the file.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, fmt.FieldSpec],
        num_rows: int,
        attributes: Mapping[str, str | int],
    ) -> None:
        try:
            with _create(path) as file:
                file.attrs.update(attributes)
                self._at = {name: _reserve(file, name, field, num_rows) for name, field in fields.items()}
        except RuntimeError as error:  # h5py's, of what could not be written when the file was closed
            raise OSError(str(error)) from None
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115, closed below

    def append(self, rows: Mapping[str, Array]) -> None:
        """Writes the next rows, the same number to every dataset, in the types of `fields`."""
        for name, array in rows.items():
            content = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.seek(self._at[name])
            self._at[name] += len(content)
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _reserve(file: h5py.File, name: str, field: fmt.FieldSpec, num_rows: int) -> int:
    """Makes a dataset; returns where its values are in the file."""
    text = field.dtype.startswith("S")
    dtype = h5py.string_dtype("utf-8", int(field.dtype[1:])) if text else np.dtype(field.dtype)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    kind = h5py.h5t.py_create(dtype, logical=True)
    space = h5py.h5s.create_simple((num_rows, *field.shape))
    link = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    link.set_create_intermediate_group(True)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, creation, link)
    return int(dataset.get_offset() or 0)  # none without values


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
