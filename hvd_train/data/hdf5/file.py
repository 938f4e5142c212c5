"""Reading HDF5 files."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, final

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data import format as fmt
from hvd_train.data.crash import naming
from hvd_train.data.facts import decode, digest_of
from hvd_train.data.files import require_regular
from hvd_train.data.format import Array
from hvd_train.data.hdf5.chunks import Range, reopened
from hvd_train.data.hdf5.field import Field
from hvd_train.data.hdf5.filters import require_filters
from hvd_train.data.hdf5.links import find, open_dataset, open_file
from hvd_train.data.places import Place, Places
from hvd_train.errors import DataError


@contextmanager
def _explained(path: str, remedy: str) -> Iterator[None]:
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


_NOT_HDF5 = "Expected a complete HDF5 file: copy or write it again."
_CHANGED = "It was damaged or changed after it was written: copy or write it again."


@final
class ShardFile:
    """One HDF5 file, open for reading, and the datasets of a sample in it.

    Raises `DataError` on opening for everything that makes the file unusable: not HDF5, truncated, a
    dataset that is missing, is outside the file, or is not numeric, lengths that differ, facts that are
    not those that were written. A file without samples is opened; `info.num_samples` is 0 then.

    Args:
        texts: whether strings of a fixed number of bytes are taken as well, as of a dtype such as `S12`.
    """

    def __init__(self, path: str | Path, places: Places, *, texts: bool = False) -> None:
        self._path = str(path)
        self._texts = texts
        self.file_path, self.group = places.file_of(self._path)
        """The file, and the group in it that is the shard; empty where all of the file is."""
        self._in_hdf5 = naming(path)
        with _explained(self.file_path, _NOT_HDF5):
            require_regular(self.file_path, "an HDF5 file")
            self._file = self._in_hdf5(open_file, self.file_path)
        # Only the default driver, which HDF5_DRIVER may change, has a file descriptor.
        self._handle = self._file.id.get_vfd_handle() if self._file.driver == "sec2" else None
        status = os.stat(self.file_path if self._handle is None else self._handle)
        self._num_bytes = status.st_size
        self.identity = (status.st_ino, status.st_mtime_ns)
        """Of two files of one name, both numbers differ. One of them may change without another file: a file
        system may number its files anew, and the time may be set."""
        try:
            with _explained(self._path, _CHANGED):
                self._in_hdf5(self._read_header, places)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        self._file.close()

    def read_into(self, name: str, ranges: Sequence[Range], out: Array) -> None:
        """Reads rows of dataset `name`: those of `ranges`, each not empty and after the one before, into
        `out`, C-contiguous, of shape [rows, *shape] with as many rows as they have together; values are
        converted to its dtype. Raises `DataError` with the rows."""
        start, stop, num_samples = ranges[0][0], ranges[-1][1], self.info.num_samples
        if not 0 <= start < stop <= num_samples:
            raise DataError(
                f"{self._path}: rows {start} to {stop} requested, but the file has {num_samples}. It was "
                "replaced by a shorter one: start the run again."
            )
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _CHANGED):
            self._fields[name].read_into(ranges, out)
        self._require_whole()

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of dataset `name`, as `read_into` gives them, in native byte order."""
        field = self.info.fields[name]
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _CHANGED):
            out: Array = np.empty((stop - start, *field.shape), np.dtype(field.dtype))
        if start < stop:
            self.read_into(name, [(start, stop)], out)
        return out

    def read_stored(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of the dataset of field `name`, all of each row: what checksums cover."""
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _CHANGED):
            (field,) = self._open_fields({name: Place(self._paths[name])}).values()
            out: Array = np.empty((stop - start, *field.spec.shape), np.dtype(field.spec.dtype))
            field.read_into([(start, stop)], out)
        self._require_whole()
        return out

    def _require_whole(self) -> None:
        # HDF5 takes bytes beyond the end of a file as zeros, without an error.
        now = self._num_bytes if self._handle is None else os.fstat(self._handle).st_size
        if now < self._num_bytes:
            raise DataError(
                f"{self._path}: {now:,} bytes, but {self._num_bytes:,} when it was opened: it was "
                "shortened while it was read. Restore the file that the run began with, or start a new run."
            )

    def is_whole(self, name: str) -> bool:
        """Whether a row of field `name` is a row of its dataset."""
        return self._fields[name].is_whole

    def checksums(self, name: str) -> npt.NDArray[np.uint64] | None:
        """The recorded checksum of each block of `info.checksum_rows` rows of dataset `name`; None if it has
        none. Raises `DataError` if they are not those that were written."""
        if self.info.checksum_rows is None:
            return None
        with _explained(f"{self._path}: checksums of `{name}`", _CHANGED):
            return self._in_hdf5(self._read_checksums, self._paths[name])  # type: ignore[no-any-return]

    def checksums_digest(self, name: str) -> str:
        """A digest of the checksums of dataset `name`, which two datasets of equal rows have in common; empty
        without checksums. They are read only where the file does not record it. Raises `DataError`."""
        if self._facts is not None:
            written = self._facts.datasets.get(self._paths[name])
            return written.checksums if written else ""
        sums = self.checksums(name)
        return "" if sums is None else digest_of(sums)

    def _read_checksums(self, path: str) -> npt.NDArray[np.uint64] | None:
        dataset = find(self._file, f"{fmt.CHECKSUMS}/{path}")
        written = self._facts.datasets.get(path) if self._facts else None
        if written is None and (dataset is None or self._facts):
            return None
        num_blocks = -(-self.info.num_samples // (self.info.checksum_rows or 1))
        sums = self._read_array(dataset, (num_blocks,), np.uint64)
        if written is not None and digest_of(sums) != written.checksums:
            raise DataError(
                f"{self._path}: the checksums of `{path}` are not those that were written. {_CHANGED}"
            )
        return sums

    def _read_array(self, dataset: Any, shape: tuple[int, ...] | None, dtype: type) -> npt.NDArray[Any]:
        """A small dataset of integers; `shape` None for any number of them."""
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iu":
            raise ValueError("expected a dataset of integers")
        if len(dataset.shape) != 1 or (shape is not None and dataset.shape != shape):
            raise ValueError(f"{list(dataset.shape)} values, expected {list(shape or ('any number',))}")
        require_filters(dataset, self._path, dataset.name)
        return np.asarray(dataset[()], dtype)

    def _read_header(self, places: Places) -> None:
        self._facts: fmt.Facts | None = None
        self._paths = {name: self._path_of(place) for name, place in places.places.items()}
        self._fields = self._open_fields(places.places)
        lengths = {name: field.num_rows for name, field in self._fields.items()}
        if len(set(lengths.values())) > 1:
            seen = ", ".join(f"`{name}` has {n} rows" for name, n in lengths.items())
            raise DataError(
                f"{self._path}: {seen}. Expected one row per sample in each: {self._remedy_of_lengths()}."
            )
        num_samples = int(next(iter(lengths.values())))
        digest = self._read_facts(num_samples)
        checksum_rows = self._checksum_rows()
        if checksum_rows is not None and any(field.axis for field in self._fields.values()):
            raise DataError(
                f"{self._path}: written by hvd_train, which has samples along the first axis, but "
                "data.samples_axis names another. Leave it out."
            )
        fields = list(self._fields.values())
        plans = [field.dataset.id.get_create_plist() for field in fields]
        self.info = fmt.ShardInfo(
            path=self._path,
            num_samples=num_samples,
            fields={name: field.spec for name, field in self._fields.items()},
            layouts={name: field.layout for name, field in self._fields.items()},
            contiguous=all(plan.get_layout() == h5py.h5d.CONTIGUOUS for plan in plans),
            class_counts=self._class_counts(places.targets),
            scale=self._scale(places.inputs),
            checksum_rows=checksum_rows,
            facts_digest=digest,
            unpacked=tuple(field.unpacked for field in fields if field.unpacked),
        )
        """The shard's header."""

    def _path_of(self, place: Place) -> str:
        path = (place.in_group(self.group) if self.group else place).dataset
        return "/".join(part for part in path.split("/") if part)

    def _open_fields(self, places: Mapping[str, Place]) -> dict[str, Field]:
        fields = {name: self._open_field(name, place) for name, place in places.items()}
        datasets = reopened([(field.dataset, field.cache_bytes) for field in fields.values()])
        for field, dataset in zip(fields.values(), datasets, strict=True):
            field.read_from(dataset, self._in_hdf5)
        return fields

    def _open_field(self, name: str, place: Place) -> Field:
        dataset = open_dataset(self._file, self._path_of(place), self._path)
        file_bytes = os.path.getsize(self.file_path)
        return Field(
            self._path,
            name,
            dataset,
            place,
            file_path=self.file_path,
            file_bytes=file_bytes,
            texts=self._texts,
            foreign=fmt.ATTR_SCHEMA not in self._file.attrs,
        )

    def _remedy_of_lengths(self) -> str:
        if any("MATLAB_class" in field.dataset.attrs for field in self._fields.values()):
            return "MATLAB stores the axes in reverse, so set data.samples_axis = -1, or write the file again"
        return "write the file again, or name the axis of the samples in data.samples_axis"

    def _read_facts(self, num_samples: int) -> str | None:
        """Reads the facts and compares them with the datasets; returns their digest, None for schema 1 and
        foreign files."""
        attributes = self._file.attrs
        schema = _integer(attributes.get(fmt.ATTR_SCHEMA))
        if schema is not None and schema not in fmt.READABLE_SCHEMAS:
            raise DataError(
                f"{self._path}: shard schema {schema}: this program reads schema {_SCHEMAS}. "
                "Use the version of hvd_train that wrote it, or write the shards anew."
            )
        facts = [attributes[key] for key in (fmt.ATTR_FACTS, fmt.ATTR_FACTS_DIGEST) if key in attributes]
        marked = facts or fmt.ATTR_NUM_SAMPLES in attributes or find(self._file, fmt.GROUP) is not None
        expected = {None: not marked, 1: not facts, 2: len(facts) == 2}
        if not expected[schema]:
            raise DataError(f"{self._path}: written by hvd_train, but its metadata is missing. {_CHANGED}")
        if schema == 1:
            recorded = _integer(attributes.get(fmt.ATTR_NUM_SAMPLES))
            if recorded is not None and recorded != num_samples:
                raise DataError(
                    f"{self._path}: {num_samples} rows, but the file records {recorded} samples. {_CHANGED}"
                )
        if schema != fmt.SCHEMA_VERSION:
            return None
        self._facts = decode(*map(bytes, facts))
        self._compare_with_facts(self._facts)
        return bytes(facts[1]).decode()

    def _compare_with_facts(self, facts: fmt.Facts) -> None:
        for name, written in facts.datasets.items():
            field = self._open_field(name, Place(name))
            shape = (field.num_rows, *field.spec.shape)
            if (shape, field.spec.dtype) != (written.shape, written.dtype):
                raise DataError(
                    f"{self._path}: dataset `{name}` is {field.spec.dtype} {list(shape)}, but "
                    f"{written.dtype} {list(written.shape)} was written. {_CHANGED}"
                )

    def _checksum_rows(self) -> int | None:
        if self._facts is not None:
            return self._facts.checksum_rows
        blocks = find(self._file, fmt.CHECKSUMS)
        rows = None if blocks is None else _integer(blocks.attrs[fmt.ATTR_CHECKSUM_ROWS])
        if rows is not None and rows < 1:
            raise ValueError(f"checksums of blocks of {rows} rows")
        return rows

    def _scale(self, name: str) -> float | None:
        if name not in self._fields:
            return None
        if self._facts is not None:
            written = self._facts.datasets.get(self._paths[name])
            return written.scale if written else None
        scale = self._fields[name].dataset.attrs.get(fmt.ATTR_SCALE)
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale {scale}, expected a finite number")
        return None if scale is None else float(scale)

    def _class_counts(self, name: str) -> tuple[int, ...] | None:
        if name not in self._fields or not self._fields[name].is_whole:
            return None
        path = self._paths[name]
        dataset = find(self._file, f"{fmt.CLASS_COUNTS}/{path}")
        written = self._facts.datasets.get(path) if self._facts else None
        expected = written.class_counts if written else None
        if expected is None and (dataset is None or self._facts):
            return None
        counts = self._read_array(dataset, None, np.int64)
        if expected is not None and digest_of(counts) != expected:
            raise DataError(f"{self._path}: the class counts are not those that were written. {_CHANGED}")
        return tuple(map(int, counts))


_SCHEMAS = " or ".join(map(str, fmt.READABLE_SCHEMAS))


def _integer(value: Any) -> int | None:
    return None if value is None else operator.index(value)


def read_info(path: str | Path, places: Places, *, texts: bool = False) -> fmt.ShardInfo:
    """The header of a shard. Arguments and errors are those of `ShardFile`."""
    with ShardFile(path, places, texts=texts) as shard:
        return shard.info


def groups_of(path: str, places: Places) -> list[str]:
    """The groups of a file that hold fields of `places`, sorted by name: of those that are in groups. Raises
    `DataError` where there are none, and for a file that cannot be read."""
    first = next(place.dataset for place in places.places.values() if place.has_groups)
    parent = [part for part in first.split("/") if part]
    parent = parent[: parent.index("*")]
    in_hdf5 = naming(path)
    with _explained(path, _NOT_HDF5):
        require_regular(path, "an HDF5 file")
        file = in_hdf5(open_file, path)
    with file, _explained(path, _CHANGED):
        groups = in_hdf5(_groups_in, file, "/".join(parent), path)
        wanted = [place for place in places.places.values() if place.has_groups]
        found = [
            g for g in groups if any(find(file, p.in_group(g).dataset, path) is not None for p in wanted)
        ]
    if not found:
        raise DataError(
            f"{path}: no group with `{first}`. Expected at least one: set data.fields to what is there."
        )
    return found


def _groups_in(file: h5py.File, parent: str, path: str) -> list[str]:
    node = find(file, parent, path) if parent else file
    return sorted(node) if isinstance(node, h5py.Group) else []
