"""One field of an HDF5 file: what a sample of it is, and reading rows of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, final

import h5py
import numpy as np

from hvd_train.data.classes import Encoder
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.hdf5.chunks import Bands, DatasetReader, Range, layout_of, pieces
from hvd_train.data.hdf5.extent import Extent, Obstacle, converted, extent_of
from hvd_train.data.hdf5.filters import require_filters
from hvd_train.data.hdf5.heaps import require_sound_heaps
from hvd_train.data.hdf5.opening import is_swmr
from hvd_train.data.hdf5.packing import packing_of, refuse_packing, unapplied
from hvd_train.data.hdf5.recipes import by_h5py, conversion, from_rows
from hvd_train.data.hdf5.stored import require_one_compression, require_plausible_storage
from hvd_train.data.hdf5.types import columns, element_type, is_table, is_text, text_dtype
from hvd_train.data.hdf5.virtual import Virtual
from hvd_train.data.layout import Layout, Whole
from hvd_train.data.places import Cut, Place
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import listed, shown
from hvd_train.liveness import mark

# HDF5 reads rows that were never written as zeros, without an end where the number of rows is damaged.
_MOST_BYTES = 1 << 30
_MOST_COMPRESSED = 100_000
_TEXT_BYTES = 128
"""Of a string of variable length in memory, about."""


class Part(Protocol):
    """A dataset that a field reads, opened anew once the chunk caches of all datasets are known."""

    @property
    def dataset(self) -> h5py.Dataset: ...

    @property
    def cache_bytes(self) -> int:
        """Chunk cache to open the dataset with."""

    def read_from(self, dataset: h5py.Dataset, call: Callable[..., Any]) -> None:
        """Rows are read from `dataset`, which is the same one, opened anew."""

    def close(self) -> None:
        """Closes the files that the rows are read from, but for the shard itself."""


@final
class Field:
    """A field of one open file.

    Raises `DataError` on construction for values that no batch can hold, and for a place that is not in the
    dataset.

    Args:
        path: of the shard, for messages.
        name: of the field.
        file_path: of the file, in which the shard may be a group.
        file_bytes: of the whole file.
        texts: whether strings of a fixed number of bytes are taken as well.
        foreign: whether attributes may say that values are packed or missing; see `packing`.
        virtual: the rows of a virtual dataset; None for any other.
        own: whether the dataset is in the file of the shard; else `path` is the file that it is in.
    """

    def __init__(
        self,
        path: str,
        name: str,
        dataset: h5py.Dataset,
        place: Place,
        *,
        file_path: str,
        file_bytes: int,
        texts: bool,
        foreign: bool,
        virtual: Virtual | None = None,
        own: bool = True,
    ) -> None:
        self._name = dataset.name.strip("/")
        self._file_path = file_path
        self._where = f"{path}: dataset `{self._name}`"
        self.path = path
        """Of the shard, or of the file that a link of it leads to."""
        self.virtual = virtual
        """The rows of a virtual dataset; None for any other."""
        self.dataset = dataset
        self.axis = self._axis(place.axis)
        """Of the samples, counted from the first."""
        if virtual is not None and self.axis:
            raise DataError(
                f"{self._where} is virtual: its rows are along its first axis, and data.samples_axis names "
                f"another. Write it again, {by_h5py(f'new[{self._name!r}] = old[{self._name!r}][...]')}"
            )
        self._cut = self._all_axes(place.cut)
        self._columns = place.columns
        self._coding = place.coding
        dtype, inner = self._types(place.columns, texts)
        self._raw = dtype
        refuse_bombs(self._where, dtype, dataset, file_bytes)
        require_filters(dataset, path, self._name)
        require_one_compression(dataset, self._where)
        numbers = foreign and not place.columns and dtype.kind not in "SO"
        kept = self._coding.ignored if self._coding else None
        self._packing = packing_of(dataset, dtype, path, self._name, kept) if numbers else None
        self._unapplied = unapplied(dataset) if numbers else ""
        if foreign and place.columns:
            refuse_packing(dataset, path, self._name)
        dtype = dtype if self._packing is None else self._packing.dtype
        self.is_whole = not (place.columns or place.cut or self.axis or self._coding)
        """Whether a row of the field is a row of the dataset."""
        self._by_chunks = not (place.columns or place.cut or self.axis or inner or dtype.kind == "O")
        self._is_stored = self._by_chunks and self._packing is None and self._coding is None
        lengths = [
            len(range(*part.indices(length)))
            for axis, (part, length) in enumerate(zip(self._cut, dataset.shape, strict=True))
            if isinstance(part, slice) and axis != self.axis
        ]
        self.num_rows = int(dataset.shape[self.axis])
        """Samples."""
        shape = (*lengths, *inner)
        self._encoder = None if self._coding is None else Encoder(self._coding, dtype, shape, self._where)
        coded = self._encoder
        self.spec = FieldSpec(
            shape=shape if coded is None else coded.shape,
            dtype="int64" if coded else dtype.str[1:] if dtype.kind == "S" else dtype.name,
            place="" if str(place) == name else str(place),
            axis=place.axis,
            follow_links=place.follow_links,
            coding=coded and coded.coding,
        )
        """A sample."""
        names = {"dataset": self._name, "file": "" if own else path}
        self.layout = replace(self._layout(shape), **names)
        """How the rows are stored; of a part of the dataset, as if the rest were not there."""

    @property
    def parts(self) -> Sequence[Part]:
        """What it opens."""
        return (self,)

    @property
    def cache_bytes(self) -> int:
        """Chunk cache to open the dataset with."""
        return self.layout.cache_bytes

    @property
    def unpacked(self) -> str:
        """What the attributes of the dataset do to its values, and which may but do not; empty if there are
        none."""
        done = [text for text in (str(self._packing or ""), self._unapplied) if text]
        return f"`{self._name}` {'; it '.join(done)}" if done else ""

    def extent(self, path: str) -> Extent | Obstacle:
        """Where its rows are in the file `path`, or why they cannot be read without the HDF5 library."""
        if self._columns:
            return converted("is a table, of which columns are read")
        if self.axis:
            return converted("has its samples along another axis than the first")
        if self._coding or self._packing is not None:
            return converted("holds values that stand for others")
        return extent_of(self.dataset, path, self._raw, self._cut[1:])

    def read_from(self, dataset: h5py.Dataset, call: Callable[..., Any]) -> None:
        """Rows are read from `dataset`, which is the same one, opened anew.

        Args:
            call: what every call of HDF5 goes through, as `call(action, *args)`.
        """
        self.dataset = dataset
        self._call = call
        self._is_checked = False
        self._reader: DatasetReader | Virtual | None = None
        self._bands: Bands | None = None
        if self._by_chunks:
            self._reader = self.virtual or DatasetReader(dataset, self.layout, call)
        elif self.layout.is_large:
            self._bands = Bands(self.layout)

    def close(self) -> None:
        """Closes the files that the rows are read from, but for the shard itself."""
        if self.virtual is not None:
            self.virtual.close()

    def read_into(self, ranges: Sequence[Range], out: Array) -> None:
        """Reads the rows of `ranges`, in ascending order, into `out`, C-contiguous, of shape [rows, *shape]
        with as many rows as they have together; values are converted to its dtype."""
        if not self._is_checked:
            self._call(self._check_stored)
            self._is_checked = True
        if out.dtype.kind == "S":
            out = out.view(self.dataset.dtype)  # which says as well whether it is UTF-8: HDF5 converts none
        if self._reader is not None and self._is_stored:
            self._reader.read_into(ranges, out)
        elif self._bands is not None:
            self._bands.read_into(ranges, out, self._read_pieces)
        else:
            self._read_pieces(ranges, out)

    def _read_pieces(self, ranges: Sequence[Range], out: Array) -> None:
        # Of a virtual dataset all of each row is read.
        layout = self.layout if self.virtual is None else self.virtual.layout(self._raw.itemsize)
        at = 0
        for start, stop in ranges:
            for begin, end in pieces(layout, start, stop):
                self._read_piece(begin, end, out[at : at + end - begin])
                at += end - begin

    def _check_stored(self) -> None:
        """Refuses what HDF5 may not survive. When rows are first read: by the ranks that need them."""
        if self.virtual is None and not is_swmr(self.dataset):  # whose chunks may be more than its rows
            require_plausible_storage(self.dataset, self.axis, self._file_path, self._where)
        if self._raw.kind == "O":
            require_sound_heaps(self.dataset, self._file_path, self._where)

    def _read_piece(self, start: int, stop: int, out: Array) -> None:
        if self._reader is not None:
            values: Array = np.empty((stop - start, *self.dataset.shape[1:]), self._raw)
            self._reader.read_into([(start, stop)], values)
        else:
            values = self._call(self._read, start, stop)
            mark()
        values = values if self._packing is None else self._packing.unpack(values, start)
        out[...] = values if self._encoder is None else self._encoder.encode(values, start)

    def _read(self, start: int, stop: int) -> Array:
        """What the file has of these rows, [rows, ...]."""
        rows = (*self._cut[: self.axis], slice(start, stop), *self._cut[self.axis + 1 :])
        if self.virtual is None:
            values = self.dataset.astype(self._memory)[rows]
        else:
            every: Array = np.empty((stop - start, *self.virtual.shape[1:]), self._memory)
            self.virtual.read_into([(start, stop)], every)
            values = every[tuple(self._cut)]
        if self._columns:
            values = self._side_by_side(values)
        before = sum(isinstance(part, slice) for part in self._cut[: self.axis])
        return np.moveaxis(values, before, 0)

    def _side_by_side(self, table: Array) -> Array:
        """The columns of a table [...] as [..., numbers]; of a single column as it is."""
        columns = [table[column] for column in self._columns]
        if len(columns) == 1:
            return columns[0]
        return np.concatenate([column.reshape(*table.shape, -1) for column in columns], axis=-1)

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        """`shape`: of what is read of a sample."""
        itemsize = _TEXT_BYTES if self._raw.kind == "O" else self._raw.itemsize
        stored = self.virtual.layout(itemsize) if self.virtual else layout_of(self.dataset, itemsize)
        if self._by_chunks:
            return stored
        part = Layout(shape=(self.num_rows, *shape), itemsize=itemsize)
        if stored.chunk is None:
            return part
        whole = Whole(
            shape=stored.shape,
            chunk=stored.chunk,
            itemsize=self.dataset.id.get_type().get_size(),
            axis=self.axis,
            band_chunks=self._chunks_touched(stored),
        )
        chunk = (stored.chunk[self.axis], *shape)
        return replace(part, chunk=chunk, filtered=stored.filtered, whole=whole)

    def _chunks_touched(self, stored: Layout) -> int:
        """By reading one sample."""
        count = 1
        for axis, (part, length, width) in enumerate(
            zip(self._cut, stored.shape, stored.chunk or (), strict=True)
        ):
            if axis != self.axis and isinstance(part, slice):
                places = range(length)[part] or range(1)
                count *= min(len(places), abs(places[-1] // width - places[0] // width) + 1)
        return count

    def _axis(self, axis: int) -> int:
        count = len(self.dataset.shape)
        if not -count <= axis < count:
            raise DataError(
                f"{self._where} has {count} axes, and data.samples_axis is {axis}. Expected an axis of every "
                "dataset: write the samples of all along the same one."
            )
        return axis % count

    def _all_axes(self, cut: Cut) -> Cut:
        """What is read of each axis of the dataset; of that of the samples, all."""
        shape = list(self.dataset.shape)
        del shape[self.axis]
        if len(cut) > len(shape):
            raise DataError(
                f"{self._where} has {len(shape)} axes a sample, {shape}, but {len(cut)} are cut. "
                "Expected a range for each axis of a sample at most; the samples are not among them."
            )
        parts: list[slice | int] = []
        for part, length in zip(cut, shape, strict=False):
            wrong = not -length <= part < length if isinstance(part, int) else not range(length)[part]
            if wrong:
                raise DataError(
                    f"{self._where}: nothing of a sample of shape {shape} is in [{_text(cut)}]. Expected "
                    f"indices below {length} there."
                )
            parts.append(part % length if isinstance(part, int) else slice(*part.indices(length)))
        parts += [slice(None)] * (len(shape) - len(parts))
        return (*parts[: self.axis], slice(None), *parts[self.axis :])

    def _types(self, chosen: tuple[str, ...], texts: bool) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The type of the numbers, and the shape of what one element of the dataset is."""
        kind = self.dataset.id.get_type()
        text = text_dtype(kind) if texts and not chosen and self._coding is None else None
        if text is not None:
            self._memory: np.dtype[Any] = text
            return text, ()
        if not chosen:
            dtype, inner = self._numbers(kind, "", texts)
            self._memory = np.dtype((dtype, inner))
            return dtype, inner
        table = self._table(kind, chosen)
        self._memory = np.dtype([(name, dtype, inner) for name, (dtype, inner) in table.items()])
        dtypes, shapes = zip(*table.values(), strict=True)
        if len(table) == 1:
            return dtypes[0], shapes[0]
        return np.result_type(*dtypes), (sum(math.prod(shape) for shape in shapes),)

    def _table(self, kind: Any, chosen: tuple[str, ...]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        table = dict(columns(kind)) if is_table(kind) else {}
        if any(column not in table for column in chosen):
            seen = f"has the columns {_some(table)}" if table else "is no table"
            raise DataError(
                f"{self._where} {seen}; expected {_some(chosen)} in it. Name columns that it has, or the "
                "dataset without brackets."
            )
        return {column: self._numbers(table[column], column, False) for column in chosen}

    def _numbers(self, kind: Any, column: str, texts: bool) -> tuple[np.dtype[Any], tuple[int, ...]]:
        dtype, inner = element_type(kind)
        if not isinstance(dtype, str):
            return dtype, inner
        if self._coding is not None and is_text(kind):
            return kind.dtype, ()
        allowed = "strings of a fixed length, " if texts else ""
        remedy = conversion(self.dataset, self._name)
        if column:
            classes = "If they are classes, list them in data.classes; else name" if is_text(kind) else "Name"
            rows = from_rows(kind, f"old[{self._name!r}][{column!r}]")
            remedy = rows or f"{classes} other columns."
        of_column = f", column `{column}`," if column else ""
        raise UnsupportedShard(
            f"{self._where}{of_column} holds {dtype}. Expected integers of 8 to 64 bits, floating-point "
            f"numbers of 16 to 64 bits, {allowed}or booleans. {remedy}"
        )


def refuse_bombs(where: str, dtype: np.dtype[Any] | str, dataset: h5py.Dataset, file_bytes: int) -> None:
    """Raises `DataError` for a dataset that is far too large for a file of so many bytes."""
    # At least as many as rows: those of samples without values have to be ordered as well.
    count = math.prod(max(1, length) for length in dataset.shape)
    num_bytes = dataset.id.get_type().get_size() * count
    if num_bytes > _MOST_BYTES + _MOST_COMPRESSED * file_bytes:
        raise DataError(
            f"{where} is {dtype} {list(dataset.shape)} in a file of {file_bytes} bytes. The number of rows "
            "is damaged, or most were never written: write it again."
        )


def _text(cut: Cut) -> str:
    return str(Place("", cut=cut)).strip("[]")


def _some(names: Iterable[str]) -> str:
    return listed([f"`{shown(name)}`" for name in names])
