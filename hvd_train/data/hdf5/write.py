"""Writing one HDF5 file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data import format as fmt
from hvd_train.data.facts import digest, encode
from hvd_train.data.format import Array
from hvd_train.data.hdf5.filters import creation_of


@final
class ShardStream:
    """One shard that is being written to a new file, whose rows arrive in order.

    Every method raises OSError. The bytes are a function of the facts, the rows and the sizes of the blocks.

    Args:
        path: must not exist.
        facts: as `finish` gets them, but that digests may be any others.
        chunk_rows: None without compression gives contiguous datasets.
    """

    def __init__(
        self, path: Path, facts: fmt.Facts, *, chunk_rows: int | None, compression: fmt.Compression
    ) -> None:
        filters = creation_of(compression)
        self._datasets: dict[str, h5py.Dataset] = {}
        self._row = 0
        with _as_os_error():
            self._file = _create(path, (fmt.GROUP, fmt.CHECKSUMS, fmt.CLASS_COUNTS))
        try:
            with _as_os_error():
                self._write_facts(facts)
                for name, written in facts.datasets.items():
                    self._reserve(name, written, chunk_rows, filters)
        except BaseException:
            self.abandon()
            raise

    def append(self, rows: Mapping[str, Array]) -> None:
        """Writes the next rows, [rows, ...], to every dataset. With chunks, whole ones but for the last."""
        count = len(next(iter(rows.values())))
        with _as_os_error():
            for name, array in rows.items():
                self._datasets[name][self._row : self._row + count] = array
        self._row += count

    def finish(
        self,
        facts: fmt.Facts,
        class_counts: Mapping[str, npt.NDArray[np.int64]],
        checksums: Mapping[str, npt.NDArray[np.uint64]],
    ) -> str:
        """Writes what is known after the last row, and closes the file; returns the digest of the facts."""
        with _as_os_error():
            for group, arrays in ((fmt.CHECKSUMS, checksums), (fmt.CLASS_COUNTS, class_counts)):
                for name, array in arrays.items():
                    self._file.create_dataset(f"{group}/{name}", data=array, track_times=False)
            result = self._write_facts(facts)
            self._file.flush()
            self._datasets.clear()
            self._file.close()
        return result

    def abandon(self) -> None:
        """Closes a file that is not complete, and is worth nothing then. May be called twice, and after
        `finish`."""
        if not self._file:
            return
        # HDF5 keeps what it could not write: it would fail with it again when the file is closed, or crash.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, self._file.id.get_vfd_handle())
        os.close(nowhere)
        self._datasets.clear()
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()

    def _write_facts(self, facts: fmt.Facts) -> str:
        text = encode(facts)
        attributes = self._file.attrs
        # Of fixed length: HDF5 has checksums for what is stored in a header, but not for its heap of strings.
        values = {
            fmt.ATTR_SCHEMA: facts.schema,
            fmt.ATTR_FACTS: np.bytes_(text),
            fmt.ATTR_FACTS_DIGEST: np.bytes_(digest(text)),
        }
        for name, value in values.items():
            # In place where the length is the same: another one is deleted, and leaves a gap.
            if name in attributes and attributes.get_id(name).dtype == np.asarray(value).dtype:
                attributes.modify(name, value)
            else:
                attributes[name] = value
        return digest(text)

    def _reserve(
        self, name: str, written: fmt.DatasetFacts, chunk_rows: int | None, filters: Mapping[str, Any]
    ) -> None:
        """Makes a dataset; space for a contiguous one is allocated before the next is made."""
        rows, *sample = written.shape
        dtype = np.dtype(written.dtype)
        dataset = self._file.create_dataset(
            name,
            written.shape,
            dtype,
            chunks=None if chunk_rows is None else (min(chunk_rows, rows), *sample),
            shuffle=filters.get("shuffle", False) and dtype.itemsize > 1,
            track_times=False,
            **{key: value for key, value in filters.items() if key != "shuffle"},
        )
        self._datasets[name] = dataset
        if chunk_rows is None and dataset.size:
            dataset[(-1,) * dataset.ndim] = 0


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # h5py's, of what could not be written when the file was closed
        raise OSError(str(error)) from None


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
