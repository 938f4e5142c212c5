"""The rows of a shard as memory that the kernel fills from its file: the ranks of a host share it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.crash import MAPPED, naming
from hvd_train.data.format import Array
from hvd_train.data.hdf5.extent import Extent, Obstacle
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.verify import Verifier
from hvd_train.errors import DataError


def obstacle(shard: ShardFile, fields: Sequence[str]) -> str:
    """Why the rows of these fields cannot be mapped, and what to do, in two sentences; empty if they can."""
    for name in fields:
        if isinstance(extent := shard.extent(name), Obstacle):
            return f"dataset `{name}` {extent.reason}. {extent.remedy}"
    return ""


@final
class MappedShard:
    """Rows of one shard, which are gathered from its mapped file; in the dtypes of its fields.

    Blocks of rows are compared with the checksums of the file when a row of them is first asked for. The file
    may be closed afterwards, and renamed or deleted: the mapping keeps it.

    Raises `DataError` on construction for a file that cannot be mapped.
    """

    def __init__(self, shard: ShardFile, fields: Sequence[str]) -> None:
        self._path = shard.info.path
        if reason := obstacle(shard, fields):
            raise DataError(f"{self._path}: with data.reading = 'mmap', {reason}")
        extents = {name: extent for name in fields if isinstance(extent := shard.extent(name), Extent)}
        self._stop = max(extent.stop for extent in extents.values())
        try:
            with open(shard.file_path, "rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(
                f"{self._path}: the file cannot be mapped into memory: {error.strerror}. data.reading = "
                "'mmap' keeps every file of a rank open (`ulimit -n`) and in its address space "
                "(`ulimit -v`): raise that limit, or choose data.reading = 'stream'."
            ) from None
        self._require_whole()
        self._values = {name: _Mapped(self._memory, extent) for name, extent in extents.items()}
        self._verifiers = {name: Verifier(shard, name) for name in fields}
        self._watched = naming(self._path, MAPPED)

    def take(self, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        """These rows of the shard, copied: {name: array [rows, *shape]}. Raises `DataError` for rows that are
        not what was written, and for a file that was cut short; should that happen while rows are copied, the
        process ends with the name of the file."""
        self._require_whole()
        return self._watched(self._take, rows)  # type: ignore[no-any-return]

    def _take(self, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        batch = {}
        for name, values in self._values.items():
            self._verifiers[name].verify(self._path, rows, values.stored)
            batch[name] = values.take(rows)
        return batch

    def _require_whole(self) -> None:
        num_bytes = self._memory.size()
        if num_bytes < self._stop:
            raise DataError(
                f"{self._path}: {num_bytes} bytes, but its rows reach up to byte {self._stop}: the file was "
                "cut short. Restore it, and start the run again."
            )

    def close(self) -> None:
        """Removes the mapping. May be called twice."""
        self._values.clear()
        self._memory.close()


@final
class _Mapped:
    """One dataset in mapped memory."""

    def __init__(self, memory: mmap.mmap, extent: Extent) -> None:
        self.stored: Array = np.ndarray(extent.shape, extent.dtype, memory, extent.offset)
        """All its rows; where the file has them, at any address and in any byte order."""
        cut = (slice(None), *extent.cut)
        self._part = self.stored[cut]
        self._shape = self._part.shape[1:]
        self._native = extent.dtype.newbyteorder("=")
        is_whole = self._shape == self.stored.shape[1:]
        row_bytes = self.stored.itemsize * int(np.prod(self._shape))
        # As bytes: numpy would first copy all rows at addresses that are no multiple of the item size.
        self._rows: Array | None = (
            np.ndarray((extent.shape[0], row_bytes), np.uint8, memory, extent.offset) if is_whole else None
        )

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        if self._rows is None:
            return np.ascontiguousarray(self._part[rows], self._native)
        taken = self._rows.take(rows, axis=0, mode="clip").view(self.stored.dtype)
        return taken.reshape(len(rows), *self._shape).astype(self._native, copy=False)
