"""Reading HDF5 files."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Sequence
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
from hvd_train.data.hdf5.chunks import DatasetReader, Range, layout_of, reopened
from hvd_train.data.hdf5.links import find, open_dataset, open_file
from hvd_train.data.hdf5.types import numpy_dtype, text_dtype
from hvd_train.errors import DataError

# HDF5 reads rows that were never written as zeros, without an end where the number of rows is damaged.
_MOST_BYTES = 1 << 30
_MOST_COMPRESSED = 100_000


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
_DAMAGED = (
    "The file is damaged, or needs an HDF5 filter that is not installed: `hvd_train shard check` says more."
)
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

    def __init__(self, path: str | Path, names: Sequence[str], *, texts: bool = False) -> None:
        self._path = str(path)
        self._texts = texts
        self._in_hdf5 = naming(path)
        with _explained(self._path, _NOT_HDF5):
            require_regular(path, "an HDF5 file")
            self._file = self._in_hdf5(open_file, path)
        try:
            with _explained(self._path, _DAMAGED):
                self._in_hdf5(self._read_header, names)
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
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _DAMAGED):
            if out.dtype.kind == "S":
                # Which says as well whether it is UTF-8: HDF5 converts none.
                out = out.view(self._datasets[name].dtype)
            self._readers[name].read_into(ranges, out)

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of dataset `name`, as `read_into` gives them, in native byte order."""
        field = self.info.fields[name]
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _DAMAGED):
            out: Array = np.empty((stop - start, *field.shape), np.dtype(field.dtype))
        if start < stop:
            self.read_into(name, [(start, stop)], out)
        return out

    def checksums(self, name: str) -> npt.NDArray[np.uint64] | None:
        """The recorded checksum of each block of `info.checksum_rows` rows of dataset `name`; None if it has
        none. Raises `DataError` if they are not those that were written."""
        if self.info.checksum_rows is None:
            return None
        with _explained(f"{self._path}: checksums of `{name}`", _DAMAGED):
            return self._in_hdf5(self._read_checksums, name)  # type: ignore[no-any-return]

    def checksums_digest(self, name: str) -> str:
        """A digest of the checksums of dataset `name`, which two datasets of equal rows have in common; empty
        without checksums. They are read only where the file does not record it. Raises `DataError`."""
        if self._facts is not None:
            return self._facts.datasets[name].checksums if name in self._facts.datasets else ""
        sums = self.checksums(name)
        return "" if sums is None else digest_of(sums)

    def _read_checksums(self, name: str) -> npt.NDArray[np.uint64] | None:
        dataset = find(self._file, f"{fmt.CHECKSUMS}/{name}")
        written = self._facts.datasets.get(name) if self._facts else None
        if written is None and (dataset is None or self._facts):
            return None
        num_blocks = -(-self.info.num_samples // (self.info.checksum_rows or 1))
        sums = self._read_array(dataset, (num_blocks,), np.uint64)
        if written is not None and digest_of(sums) != written.checksums:
            raise DataError(
                f"{self._path}: the checksums of `{name}` are not those that were written. {_CHANGED}"
            )
        return sums

    def _read_array(self, dataset: Any, shape: tuple[int, ...] | None, dtype: type) -> npt.NDArray[Any]:
        """A small dataset of integers; `shape` None for any number of them."""
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "iu":
            raise ValueError("expected a dataset of integers")
        if len(dataset.shape) != 1 or (shape is not None and dataset.shape != shape):
            raise ValueError(f"{list(dataset.shape)} values, expected {list(shape or ('any number',))}")
        return np.asarray(dataset[()], dtype)

    def _read_header(self, names: Sequence[str]) -> None:
        self._facts: fmt.Facts | None = None
        self._datasets = {name: open_dataset(self._file, name, self._path) for name in names}
        fields = {name: self._field(name, dataset) for name, dataset in self._datasets.items()}
        layouts = {n: layout_of(d, np.dtype(fields[n].dtype).itemsize) for n, d in self._datasets.items()}
        self._datasets = reopened(self._datasets, layouts)
        self._readers = {n: DatasetReader(d, layouts[n], self._in_hdf5) for n, d in self._datasets.items()}
        lengths = {name: d.shape[0] for name, d in self._datasets.items()}
        if len(set(lengths.values())) > 1:
            seen = ", ".join(f"`{name}` has {n} rows" for name, n in lengths.items())
            raise DataError(
                f"{self._path}: {seen}. Expected one row per sample in each: write the file again."
            )
        num_samples = int(next(iter(lengths.values())))
        digest = self._read_facts(num_samples)
        datasets = list(self._datasets.values())
        self.info = fmt.ShardInfo(
            path=self._path,
            num_samples=num_samples,
            fields=fields,
            layouts=layouts,
            contiguous=all(d.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS for d in datasets),
            class_counts=self._class_counts(names[-1]),
            scale=self._scale(names[0]),
            checksum_rows=self._checksum_rows(),
            facts_digest=digest,
        )
        """The shard's header."""

    def _field(self, name: str, dataset: h5py.Dataset) -> fmt.FieldSpec:
        kind = dataset.id.get_type()
        text = text_dtype(kind) if self._texts else None
        dtype = numpy_dtype(kind) if text is None else text
        if isinstance(dtype, str):
            texts = "strings of a fixed length, " if self._texts else ""
            raise DataError(
                f"{self._path}: dataset `{name}` holds {dtype}. Expected integers of 8 to 64 bits, "
                f"floating-point numbers of 16 to 64 bits, {texts}or booleans: convert it."
            )
        file_bytes = os.path.getsize(self._path)
        if dtype.itemsize * math.prod(dataset.shape) > _MOST_BYTES + _MOST_COMPRESSED * file_bytes:
            raise DataError(
                f"{self._path}: dataset `{name}` is {dtype} {list(dataset.shape)} in a file of {file_bytes} "
                "bytes. The number of rows is damaged, or most were never written: write it again."
            )
        plain = dtype.str[1:] if dtype.kind == "S" else dtype.name
        return fmt.FieldSpec(shape=tuple(map(int, dataset.shape[1:])), dtype=plain)

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
            dataset = self._datasets.get(name)
            if dataset is None:
                dataset = open_dataset(self._file, name, self._path)
            field = self._field(name, dataset)
            if (dataset.shape, field.dtype) != (written.shape, written.dtype):
                raise DataError(
                    f"{self._path}: dataset `{name}` is {field.dtype} {list(dataset.shape)}, but "
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
        if self._facts is not None:
            return self._facts.datasets[name].scale if name in self._facts.datasets else None
        scale = self._datasets[name].attrs.get(fmt.ATTR_SCALE)
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale {scale}, expected a finite number")
        return None if scale is None else float(scale)

    def _class_counts(self, name: str) -> tuple[int, ...] | None:
        dataset = find(self._file, f"{fmt.CLASS_COUNTS}/{name}")
        written = self._facts.datasets.get(name) if self._facts else None
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


def read_info(path: str | Path, names: Sequence[str], *, texts: bool = False) -> fmt.ShardInfo:
    """The header of a shard. Arguments and errors are those of `ShardFile`."""
    with ShardFile(path, names, texts=texts) as shard:
        return shard.info
