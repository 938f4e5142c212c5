"""What the rows of a shard are taken from: one interface, and arrays as its first implementation."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt
import xxhash

from hvd_train.data.blocks import row_bytes
from hvd_train.data.format import Array, FieldSpec
from hvd_train.errors import DataError

INPUTS, TARGETS = "inputs", "targets"

GROUP = "\0group"
"""In blocks: the number of the group that each row belongs to, int64. It is no field, and is not written."""

BLOCK_BYTES = 4 << 20
"""Of a block of rows, unless a single row is larger."""

Block = Mapping[str, Array]
"""Consecutive rows by the name of the field, [rows, ...] each, in native byte order."""


def name_of(paths: Sequence[str]) -> str:
    """Some files, for messages."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


class Source(ABC):
    """Rows in a fixed order, read in blocks: no more than a few blocks are in memory at a time.

    Every method raises `DataError`, with the file and the row, for what cannot be written as a shard.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages: the file, or what the user gave."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, FieldSpec]:
        """The fields of a row: `inputs`, `targets`, and others."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """None if it is known only after all rows were read."""

    @property
    def scale(self) -> float | None:
        """What integer inputs are to be multiplied by before the model; None: nothing is known."""
        return None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers; empty if nothing is known."""
        return ()

    @property
    def files(self) -> Collection[str]:
        """The files that are read. A source whose files have not changed gives the same rows again."""
        return ()

    @property
    def position(self) -> tuple[int, int]:
        """Bytes of the files that the `blocks` under way have read, and those there are; 0 of 0 where rows
        can be counted."""
        return 0, 0

    @abstractmethod
    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        """The rows from number `start` on, in order; may be called again.

        Args:
            names: the fields that are wanted; empty for all. Others may be left out.
        """


def rows_of_block(fields: Mapping[str, FieldSpec]) -> int:
    """Rows of one block of about `BLOCK_BYTES`; at least 1."""
    return max(1, BLOCK_BYTES // max(1, sum(map(row_bytes, fields.values()))))


def stored_dtype(dtype: np.dtype[Any], where: str) -> np.dtype[Any]:
    """The type in which a shard holds values of `dtype`. Raises `DataError` for what is no number."""
    if dtype.kind not in "biuf":
        raise DataError(f"{where} are {dtype}. Expected integers, floating-point numbers or booleans.")
    # Long double has another layout on every machine, and torch has none.
    return np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")


def alike(name: str, lengths: Mapping[str, int]) -> str:
    """The message for fields of different lengths, or without rows."""
    seen = " and ".join(f"{length} {field}" for field, length in lengths.items())
    return (
        f"{name}: {seen}. Expected the same number of each, and at least 1: give the inputs and the targets "
        "of one data set."
    )


def group_numbers(values: Array, where: str) -> npt.NDArray[np.int64]:
    """Integers as they are, a hash of each text. Raises `DataError` for other values."""
    if values.ndim != 1 or values.dtype.kind not in "biuSUO":
        raise DataError(
            f"{where}: the values are {values.dtype} {list(values.shape[1:])} a row. Expected one integer or "
            "text: name another field."
        )
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    texts = (value if isinstance(value, bytes) else str(value).encode() for value in values.tolist())
    return np.array([xxhash.xxh3_64_intdigest(text) for text in texts], np.uint64).view(np.int64)


@final
@dataclass(frozen=True)
class Arrays(Source):
    """Arrays in memory, mapped into it, or `StreamedArray`s."""

    inputs: Array
    """[samples, ...]"""

    targets: Array
    """[samples, ...]"""

    scale: float | None = None
    """What integer inputs are to be multiplied by before the model; None: nothing is known."""

    others: Mapping[str, Array] = field(default_factory=dict)
    """Further fields, [samples, ...]."""

    group: Array | None = None
    """Which group each row belongs to, [samples]; integers or text."""

    name: str = "the arrays"
    files: tuple[str, ...] = ()

    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of fields that are written in another type than that of their array."""

    def take(self, rows: npt.NDArray[np.intp]) -> Arrays:
        """These rows of the inputs and targets, in this order."""
        return Arrays(self.inputs[rows], self.targets[rows], self.scale)

    @property
    def num_rows(self) -> int:
        return len(self.targets)

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        specs = {}
        for name, array in self._columns().items():
            dtype = self.dtypes.get(name) or stored_dtype(array.dtype, name).name
            specs[name] = FieldSpec(shape=array.shape[1:], dtype=dtype)
        return specs

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        fields = self.fields
        rows = rows_of_block(fields)
        columns = {name: array for name, array in self._columns().items() if not names or name in names}
        for first in range(start, self.num_rows, rows):
            block = {}
            for name, array in columns.items():
                block[name] = np.array(array[first : first + rows], fields[name].dtype, order="C")
                _forget_pages(array)
            if self.group is not None and (not names or GROUP in names):
                block[GROUP] = group_numbers(self.group[first : first + rows], f"{self.name}: --group")
            yield block

    def _columns(self) -> Mapping[str, Array]:
        return {INPUTS: self.inputs, TARGETS: self.targets, **self.others}


def _forget_pages(array: Array) -> None:
    """Unmaps what was read of a mapped file; until then it counts as memory of this process."""
    mapped: Any = array.base if isinstance(array, np.memmap) else None
    if isinstance(mapped, mmap.mmap):
        mapped.madvise(mmap.MADV_DONTNEED)
