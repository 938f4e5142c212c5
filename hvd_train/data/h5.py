"""HDF5 files: the only module that imports h5py.

A shard is data, not a program: links that leave the file, virtual datasets and external storage are
refused, so that reading a shard opens that one file and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

import h5py
import numpy as np
import numpy.typing as npt

from hvd_train.data import format as fmt
from hvd_train.errors import DataError

Array = npt.NDArray[Any]

_MAX_LISTED = 12
_MAX_SOFT_LINKS = 16


@contextmanager
def _explained(path: str, remedy: str) -> Iterator[None]:
    # h5py reports a damaged file by any of these, according to which structure in it is damaged.
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected an HDF5 file that every rank can see.") from None
    except PermissionError:
        raise DataError(f"{path}: permission denied. Make the file readable for this user.") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip("'\"")
        raise DataError(f"{path}: {reason}. {remedy}") from None


_NOT_HDF5 = "Expected a complete HDF5 file: copy or write it again."
_DAMAGED = (
    "The file is damaged, or needs an HDF5 filter that is not installed: `hvd_train shard check` tells more."
)


@final
class ShardFile:
    """One HDF5 file, open for reading, and the datasets of a sample in it.

    Raises `DataError` on opening for everything that makes the file unusable: not HDF5, truncated, a
    dataset that is missing, lies outside the file, or is not numeric, lengths that differ, no samples.
    """

    def __init__(self, path: str | Path, names: Sequence[str]) -> None:
        self._path = str(path)
        with _explained(self._path, _NOT_HDF5):
            if Path(path).is_dir():
                raise IsADirectoryError("is a folder")
            self._file = _open(path)
        try:
            with _explained(self._path, _DAMAGED):
                self._datasets = {name: _open_dataset(self._file, name, self._path) for name in names}
                self.info = self._read_info()
                """The shard's header."""
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

    def read_into(self, name: str, start: int, stop: int, out: Array) -> None:
        """Reads rows `start` up to `stop` of dataset `name` into `out`, C-contiguous, of shape
        [stop - start, *shape]; values are converted to its dtype. Raises `DataError` with the rows."""
        if start == stop:
            return
        num_samples = self.info.num_samples
        if not 0 <= start < stop <= num_samples:
            raise DataError(
                f"{self._path}: rows {start} to {stop} were asked for, the file has {num_samples}. It was "
                "replaced by a shorter one: start the run again."
            )
        with _explained(f"{self._path}: dataset `{name}`, rows {start} to {stop - 1}", _DAMAGED):
            self._datasets[name].read_direct(out, np.s_[start:stop])

    def read(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` up to `stop` of dataset `name`, as `read_into` gives them, in native byte order."""
        field = self.info.fields[name]
        out: Array = np.empty((stop - start, *field.shape), np.dtype(field.dtype))
        self.read_into(name, start, stop, out)
        return out

    def checksums(self, name: str) -> npt.NDArray[np.uint64] | None:
        """The recorded checksum of each block of `info.checksum_rows` rows of dataset `name`, if any."""
        if self.info.checksum_rows is None:
            return None
        with _explained(f"{self._path}: checksums of `{name}`", _DAMAGED):
            dataset = _find(self._file, f"{fmt.CHECKSUMS}/{name}")
            return None if dataset is None else np.asarray(dataset[()], np.uint64)

    def _read_info(self) -> fmt.ShardInfo:
        lengths = {name: d.shape[0] for name, d in self._datasets.items()}
        if len(set(lengths.values())) > 1:
            seen = ", ".join(f"`{name}` has {n} rows" for name, n in lengths.items())
            raise DataError(
                f"{self._path}: {seen}. Expected one row per sample in each: write the file again."
            )
        num_samples = next(iter(lengths.values()))
        if num_samples == 0:
            raise DataError(f"{self._path}: no samples. Expected at least 1: leave the file out.")
        self._check_attributes(num_samples)
        datasets = list(self._datasets.values())
        scale = datasets[0].attrs.get(fmt.ATTR_SCALE)
        counts = _find(self._file, f"{fmt.CLASS_COUNTS}/{list(self._datasets)[-1]}")
        blocks = _find(self._file, fmt.CHECKSUMS)
        rows = None if blocks is None else int(blocks.attrs[fmt.ATTR_CHECKSUM_ROWS])
        if rows is not None and rows < 1:
            raise ValueError(f"checksums of blocks of {rows} rows")
        return fmt.ShardInfo(
            path=self._path,
            num_samples=num_samples,
            fields={
                name: fmt.FieldSpec(shape=tuple(map(int, d.shape[1:])), dtype=d.dtype.newbyteorder("=").name)
                for name, d in self._datasets.items()
            },
            chunk_rows=None if datasets[0].chunks is None else int(datasets[0].chunks[0]),
            contiguous=all(d.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS for d in datasets),
            compressed=any(d.id.get_create_plist().get_nfilters() > 0 for d in datasets),
            class_counts=None if counts is None else tuple(map(int, counts[()])),
            scale=None if scale is None else float(scale),
            checksum_rows=rows,
        )

    def _check_attributes(self, num_samples: int) -> None:
        schema = self._file.attrs.get(fmt.ATTR_SCHEMA)
        if schema is not None and int(schema) != fmt.SCHEMA_VERSION:
            raise DataError(
                f"{self._path}: shard schema {schema}: this program reads schema {fmt.SCHEMA_VERSION}. "
                "Use the version of hvd_train that wrote it, or write the shards anew."
            )
        recorded = self._file.attrs.get(fmt.ATTR_NUM_SAMPLES)
        if recorded is not None and int(recorded) != num_samples:
            raise DataError(
                f"{self._path}: {num_samples} rows, but the file records {int(recorded)} samples. "
                "It was changed after it was written: write it again."
            )


def _open(path: str | Path) -> h5py.File:
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


def _open_dataset(file: h5py.File, name: str, path: str) -> h5py.Dataset:
    dataset = _find(file, name, path)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(
            f"{path}: no dataset `{name}`; {_found(file)}. "
            "Set data.inputs and data.targets to the names of the datasets of inputs and targets."
        )
    if dataset.is_virtual or dataset.external:
        kind = "is virtual" if dataset.is_virtual else "has external storage"
        raise DataError(
            f"{path}: dataset `{name}` {kind}: its values lie in other files. "
            "Expected them in this file: copy it with h5repack."
        )
    if not dataset.shape:
        raise DataError(f"{path}: dataset `{name}` is a single value. Expected samples along its first axis.")
    if dataset.dtype.kind not in "biuf":
        raise DataError(
            f"{path}: dataset `{name}` holds {dataset.dtype}. "
            "Expected integers, floating-point numbers or booleans."
        )
    return dataset


def _find(file: h5py.File, name: str, path: str = "") -> h5py.Dataset | h5py.Group | None:
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
                    f"{path or file.filename}: `{name}` is a circle of soft links. Remove one of them."
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


def _found(file: h5py.File) -> str:
    found: list[str] = []

    def collect(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith(fmt.GROUP + "/"):
            found.append(f"`{name}` {list(node.shape or ())} {node.dtype}")

    file.visititems(collect)
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return "the file has " + (", ".join(found[:_MAX_LISTED]) + more if found else "no datasets")


def read_info(path: str | Path, names: Sequence[str]) -> fmt.ShardInfo:
    """The header of a shard. Raises `DataError` as `ShardFile` does."""
    with ShardFile(path, names) as shard:
        return shard.info


def write_file(
    path: Path,
    datasets: Mapping[str, Array],
    *,
    chunk_rows: int | None,
    compression: Literal["none", "gzip"],
    scale: float | None,
    class_counts: Sequence[int] | None,
    checksums: Mapping[str, npt.NDArray[np.uint64]],
    checksum_rows: int,
) -> None:
    """Writes one shard to `path`, which must not exist.

    `datasets` are arrays [rows, ...] of equal length; `scale` belongs to the first, `class_counts` to the
    last. `chunk_rows` None with no compression gives contiguous datasets. The bytes are a function of the
    arguments alone. Raises OSError.
    """
    # best-effort: a lock keeps two writers apart where the file system has locks, and is no condition.
    with h5py.File(path, "x", locking="best-effort") as file:
        file.attrs[fmt.ATTR_SCHEMA] = fmt.SCHEMA_VERSION
        file.attrs[fmt.ATTR_NUM_SAMPLES] = len(next(iter(datasets.values())))
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
            file.create_dataset(f"{fmt.CHECKSUMS}/{name}", data=checksums[name], track_times=False)
        file[fmt.CHECKSUMS].attrs[fmt.ATTR_CHECKSUM_ROWS] = checksum_rows
        first, last = next(iter(datasets)), list(datasets)[-1]
        if scale is not None:
            file[first].attrs[fmt.ATTR_SCALE] = scale
        if class_counts is not None:
            counts = np.asarray(class_counts, np.int64)
            file.create_dataset(f"{fmt.CLASS_COUNTS}/{last}", data=counts, track_times=False)
