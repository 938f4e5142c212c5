"""Reading HDF5 files."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
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
from hvd_train.data.hdf5.chunks import Range
from hvd_train.data.hdf5.explained import CHANGED, NOT_HDF5, explained
from hvd_train.data.hdf5.extent import Extent, Obstacle, converted
from hvd_train.data.hdf5.field import Field
from hvd_train.data.hdf5.fields import Opening
from hvd_train.data.hdf5.filters import require_filters
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.data.hdf5.links import find
from hvd_train.data.hdf5.mappings import identity_of
from hvd_train.data.hdf5.opening import open_file
from hvd_train.data.hdf5.ragged import PaddedField
from hvd_train.data.hdf5.selections import Axis, Stretch
from hvd_train.data.layout import repack_line
from hvd_train.data.places import Place, Places
from hvd_train.errors import DataError, UnsupportedShard


@final
class ShardFile:
    """One HDF5 file, open for reading, and the datasets of a sample in it.

    Raises `DataError` on opening for everything that makes the file unusable: not HDF5, truncated, a
    dataset that is missing, is outside the file, or is not numeric, lengths that differ, facts that are
    not those that were written. A file without samples is opened; `info.num_samples` is 0 then.

    Args:
        texts: whether strings of a fixed number of bytes are taken as well, as of a dtype such as `S12`.
        copy: of the file, which is read in its place; empty: the file itself is read.
    """

    def __init__(self, path: str | Path, places: Places, *, texts: bool = False, copy: str = "") -> None:
        self._path = str(path)
        self.file_path, self.group = places.file_of(self._path)
        """The file, and the group in it that is the shard; empty where all of the file is."""
        self._in_hdf5 = naming(path)
        where = f"{self.file_path}, copied to {copy}" if copy else self.file_path
        self.file_path = copy or self.file_path
        with explained(where, NOT_HDF5):
            require_regular(self.file_path, "an HDF5 file")
            self._file = self._in_hdf5(open_file, self.file_path)
        # Only the default driver, which HDF5_DRIVER may change, has a file descriptor.
        self._handle = self._file.id.get_vfd_handle() if self._file.driver == "sec2" else None
        status = os.stat(self.file_path if self._handle is None else self._handle)
        self._num_bytes = status.st_size
        self.identity = (status.st_ino, status.st_mtime_ns)
        """Of two files of one name, both numbers differ. One of them may change without another file: a file
        system may number its files anew, and the time may be set."""
        self._fields: dict[str, Field | PaddedField] = {}
        self._linked = LinkedFiles(self.file_path, places.follow_links)
        self._opening = Opening(
            self._file,
            self._path,
            self.file_path,
            self.group,
            file_bytes=self._num_bytes,
            texts=texts,
            linked=self._linked,
            call=self._in_hdf5,
        )
        try:
            with explained(self._path, CHANGED):
                self._in_hdf5(self._read_header, places)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, and those that its links lead to. May be called twice."""
        for field in self._fields.values():
            field.close()
        self._linked.close()
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
        with explained(f"{self._where(name)}, rows {start} to {stop - 1}", CHANGED):
            try:
                self._fields[name].read_into(ranges, out)
            except (MemoryError, OSError):
                self._require_memory(name)
                raise
        self._require_whole()

    def _require_memory(self, name: str) -> None:
        """Raises `UnsupportedShard` if there is no memory to decode a chunk of field `name`: HDF5 fails then
        as it does at a damaged chunk."""
        layout = self._fields[name].layout
        try:
            bytearray(layout.decoding_bytes + layout.held_bytes)
        except MemoryError:
            raise UnsupportedShard(
                f"{self._where(name)}: there is no memory to decode its {layout.in_words()}. Give each rank "
                "more memory, or write the file in smaller chunks: "
                f"`{repack_line(self._path, name, self.info.layouts)}`."
            ) from None

    def check_lengths(self, name: str, start: int, stop: int) -> None:
        """Raises `DataError` for the first of these rows of field `name`, of rows of any length, that is
        damaged, or longer than is allowed. Values are not read."""
        field = self._fields[name]
        if isinstance(field, PaddedField):
            with explained(f"{self._where(name)}, rows {start} to {stop - 1}", CHANGED):
                field.check_lengths(start, stop)

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of dataset `name`, as `read_into` gives them, in native byte order."""
        field = self.info.fields[name]
        with explained(f"{self._where(name)}, rows {start} to {stop - 1}", CHANGED):
            out: Array = np.empty((stop - start, *field.shape), np.dtype(field.dtype))
        if start < stop:
            self.read_into(name, [(start, stop)], out)
        return out

    def read_stored(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of the dataset of field `name`, all of each row: what checksums cover."""
        with explained(f"{self._where(name)}, rows {start} to {stop - 1}", CHANGED):
            (field,) = self._opening.fields({name: Place(self._paths[name])}).values()
            out: Array = np.empty((stop - start, *field.spec.shape), np.dtype(field.spec.dtype))
            field.read_into([(start, stop)], out)
        self._require_whole()
        return out

    def _where(self, name: str) -> str:
        """A dataset, for messages: in the file that it is in."""
        return f"{self._fields[name].path}: dataset `{name}`"

    def stretches(self, name: str) -> list[Stretch]:
        """Which rows of which datasets, in which files, the rows of field `name` are. Empty unless links are
        followed, or without such a field."""
        field = self._fields.get(name)
        if field is None or isinstance(field, PaddedField) or not self._linked.follow:
            return []
        if field.virtual is not None:
            return [Stretch(m.source.identity, m.chosen[0], m.source.where) for m in field.virtual.mappings]
        where = f"{field.dataset.file.filename}: dataset `{field.dataset.name.strip('/')}`"
        return [Stretch(identity_of(field.dataset), Axis(0, 1, 1, field.num_rows), where)]

    def extent(self, name: str) -> Extent | Obstacle:
        """Where the rows of field `name` are in the file, or why they cannot be read without HDF5."""
        field = self._fields[name]
        with explained(self._where(name), CHANGED):
            if field.dataset.file != self._file:
                return converted("is in another file, to which a link leads")
            return self._in_hdf5(field.extent, self.file_path)  # type: ignore[no-any-return]

    def _require_whole(self) -> None:
        # HDF5 takes bytes beyond the end of a file as zeros, without an error.
        now = self._num_bytes if self._handle is None else os.fstat(self._handle).st_size
        if now < self._num_bytes:
            raise DataError(
                f"{self._path}: {now:,} bytes, but {self._num_bytes:,} when it was opened: it was "
                "shortened while it was read. Restore the file that the run began with, or start a new run."
            )

    def _files(self) -> list[h5py.File]:
        """Those that the datasets are in."""
        if not self._linked.follow:
            return [self._file]
        return [field.dataset.file for field in self._fields.values()]

    def is_whole(self, name: str) -> bool:
        """Whether a row of field `name` is a row of its dataset."""
        return self._fields[name].is_whole

    def checksums(self, name: str) -> npt.NDArray[np.uint64] | None:
        """The recorded checksum of each block of `info.checksum_rows` rows of dataset `name`; None if it has
        none, as rows of any length. Raises `DataError` if they are not those that were written."""
        if self.info.checksum_rows is None or self.info.fields[name].padding:
            return None
        with explained(f"{self._path}: checksums of `{name}`", CHANGED):
            return self._in_hdf5(self._read_checksums, self._paths[name])  # type: ignore[no-any-return]

    def checksums_digest(self, name: str) -> str:
        """A digest of the checksums of dataset `name`, which two datasets of equal rows have in common; empty
        without checksums. They are read only where the file does not record it. Raises `DataError`."""
        if self._facts is not None and not self.info.fields[name].padding:
            written = self._facts.datasets.get(self._paths[name])
            return written.checksums if written else ""
        sums = self.checksums(name)
        return "" if sums is None else digest_of(sums)

    def _read_checksums(self, path: str) -> npt.NDArray[np.uint64] | None:
        dataset = self._recorded(f"{fmt.CHECKSUMS}/{path}")
        written = self._facts.datasets.get(path) if self._facts else None
        if written is None and (dataset is None or self._facts):
            return None
        num_blocks = -(-self.info.num_samples // (self.info.checksum_rows or 1))
        sums = self._read_array(dataset, (num_blocks,), np.uint64)
        if written is not None and digest_of(sums) != written.checksums:
            raise DataError(
                f"{self._path}: the checksums of `{path}` are not those that were written. {CHANGED}"
            )
        return sums

    def _recorded(self, name: str) -> h5py.HLObject | None:
        """What `shard write` recorded; None if it did not write the file, or not this."""
        return find(self._file, name) if self._has_group else None

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
        self._has_group = find(self._file, fmt.GROUP) is not None
        wanted = self._opening.with_masks(places)
        self._paths = {name: self._opening.path_of(place) for name, place in wanted.items()}
        self._fields = self._opening.fields(wanted)
        lengths = {name: self._fields[name].num_rows for name in places.places}
        growing = any(file.swmr_mode for file in self._files())
        if len(set(lengths.values())) > 1 and not growing:
            seen = ", ".join(f"`{name}` has {n} rows" for name, n in lengths.items())
            raise DataError(
                f"{self._path}: {seen}. Expected one row per sample in each: "
                f"{self._remedy_of_lengths(places)}."
            )
        num_samples = min(lengths.values())
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
            contiguous=not any(field.spec.padding for field in fields)
            and all(
                plan.get_layout() == h5py.h5d.CONTIGUOUS and not plan.get_external_count() for plan in plans
            )
            and all(file == self._file for file in self._files()),
            class_counts=self._class_counts(places.targets),
            scale=self._scale(places.inputs),
            checksum_rows=checksum_rows,
            facts_digest=digest,
            unpacked=tuple(field.unpacked for field in fields if field.unpacked),
            growing=growing,
        )
        """The shard's header."""

    def _remedy_of_lengths(self, places: Places) -> str:
        for place in places.places.values():
            if place.bounds is not None and place.bounds.kind == "offsets":
                starts = replace(place, bounds=replace(place.bounds, kind="starts"))
                return (
                    f"write the file again, or if it has the start of each row alone, name it as `{starts}`"
                )
        if any("MATLAB_class" in field.dataset.attrs for field in self._fields.values()):
            return "MATLAB stores the axes in reverse, so set data.samples_axis = -1, or write the file again"
        return "write the file again, or name the axis of the samples in data.samples_axis"

    def _read_facts(self, num_samples: int) -> str | None:
        """Reads the facts and compares them with the datasets; returns their digest, None for schema 1 and
        foreign files."""
        attributes = self._opening.attributes
        schema = _integer(attributes.get(fmt.ATTR_SCHEMA))
        if schema is not None and schema not in fmt.READABLE_SCHEMAS:
            raise DataError(
                f"{self._path}: shard schema {schema}: this program reads schema {_SCHEMAS}. "
                "Use the version of hvd_train that wrote it, or write the shards anew."
            )
        facts = [attributes[key] for key in (fmt.ATTR_FACTS, fmt.ATTR_FACTS_DIGEST) if key in attributes]
        marked = facts or fmt.ATTR_NUM_SAMPLES in attributes or self._has_group
        expected = {None: not marked, 1: not facts, 2: len(facts) == 2}
        if not expected[schema]:
            raise DataError(f"{self._path}: written by hvd_train, but its metadata is missing. {CHANGED}")
        if schema == 1:
            recorded = _integer(attributes.get(fmt.ATTR_NUM_SAMPLES))
            if recorded is not None and recorded != num_samples:
                raise DataError(
                    f"{self._path}: {num_samples} rows, but the file records {recorded} samples. {CHANGED}"
                )
        if schema != fmt.SCHEMA_VERSION:
            return None
        self._facts = decode(*map(bytes, facts))
        self._compare_with_facts(self._facts)
        return bytes(facts[1]).decode()

    def _compare_with_facts(self, facts: fmt.Facts) -> None:
        for name, written in facts.datasets.items():
            field = self._opening.field(name, Place(name))
            shape = (field.num_rows, *field.spec.shape)
            if (shape, field.spec.dtype) != (written.shape, written.dtype):
                raise DataError(
                    f"{self._path}: dataset `{name}` is {field.spec.dtype} {list(shape)}, but "
                    f"{written.dtype} {list(written.shape)} was written. {CHANGED}"
                )

    def _checksum_rows(self) -> int | None:
        if self._facts is not None:
            return self._facts.checksum_rows
        blocks = self._recorded(fmt.CHECKSUMS)
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
        dataset = self._recorded(f"{fmt.CLASS_COUNTS}/{path}")
        written = self._facts.datasets.get(path) if self._facts else None
        expected = written.class_counts if written else None
        if expected is None and (dataset is None or self._facts):
            return None
        counts = self._read_array(dataset, None, np.int64)
        if expected is not None and digest_of(counts) != expected:
            raise DataError(f"{self._path}: the class counts are not those that were written. {CHANGED}")
        return tuple(map(int, counts))


_SCHEMAS = " or ".join(map(str, fmt.READABLE_SCHEMAS))


def _integer(value: Any) -> int | None:
    return None if value is None else operator.index(value)


def read_info(path: str | Path, places: Places, *, texts: bool = False) -> fmt.ShardInfo:
    """The header of a shard. Arguments and errors are those of `ShardFile`."""
    with ShardFile(path, places, texts=texts) as shard:
        return shard.info
