"""Rows of a dataset of variable-length type (H5T_VLEN): how long they are, and their values.

The dataset has a reference for each row: its length, and where its values are in the heaps of the file. The
references are read here as they are stored, since HDF5 offers no way to read lengths alone.

Each row is found in the heaps on its own, in about 1 us; `packed` rows are read several times faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, final

import h5py
import numpy as np

from hvd_train.data.classes import Encoder
from hvd_train.data.format import Array, Coding, FieldSpec
from hvd_train.data.hdf5.field import Part, refuse_bombs
from hvd_train.data.hdf5.filters import require_filters
from hvd_train.data.hdf5.packing import packing_of
from hvd_train.data.hdf5.ragged import Numbers, RaggedRows
from hvd_train.data.hdf5.types import numpy_dtype
from hvd_train.data.hdf5.vlen_heaps import Heaps
from hvd_train.data.layout import HELD_BYTES, SMALL_BYTES
from hvd_train.errors import DataError, UnsupportedShard

_MOST_CHUNK_BYTES = 256 << 20
"""Of the references in a chunk that passed filters, which is decoded as a whole."""

_numbers = count()


@final
class VlenRows(RaggedRows):
    """The rows of a dataset [rows] of variable-length type, of numbers or booleans.

    Args:
        path: of the shard, for messages.
        coding: how values become class numbers; None for values as they are.
        file_bytes: of the whole file.
        call: what every call of HDF5 goes through, as `call(action, *args)`.

    Raises `DataError` for values that no batch can hold.
    """

    def __init__(
        self,
        path: str,
        dataset: h5py.Dataset,
        coding: Coding | None,
        file_bytes: int,
        call: Callable[..., Any],
    ) -> None:
        name = dataset.name.strip("/")
        self.name = f"dataset `{name}`"
        self._where = f"{path}: dataset `{name}`"
        self.read_from(dataset, call)
        self.num_rows = int(dataset.shape[0])
        kind = dataset.id.get_type().get_super()
        dtype = numpy_dtype(kind)
        assert not isinstance(dtype, str), "rows of numbers"
        refuse_bombs(self._where, f"rows of variable length ({dtype})", dataset, file_bytes)
        require_filters(dataset, path, name)
        self._refuse_large_chunks()
        self._kind = kind.get_super() if kind.get_class() == h5py.h5t.ENUM else kind
        self._value_bytes, self._dtype, self._file_bytes = kind.get_size(), dtype, file_bytes
        self._packing = packing_of(dataset, dtype, path, name, coding.ignored if coding else None)
        self.unpacked = f"`{name}` {self._packing}" if str(self._packing or "") else ""
        value = dtype if self._packing is None else self._packing.dtype
        self._encoder = None if coding is None else Encoder(coding, value, (), self._where)
        self._held: tuple[int, Array] | None = None
        self._heaps: Heaps | None = None
        self.value = FieldSpec(
            shape=(),
            dtype="int64" if self._encoder else value.name,
            coding=self._encoder and self._encoder.coding,
        )

    def _refuse_large_chunks(self) -> None:
        chunk, filtered = self._dataset.chunks, self._dataset.id.get_create_plist().get_nfilters()
        if chunk is not None and filtered and chunk[0] * self._reference.itemsize > _MOST_CHUNK_BYTES:
            name = self._dataset.name.strip("/")
            raise UnsupportedShard(
                f"{self._where} is compressed in chunks of {chunk[0]:,} rows; expected at most "
                f"{_MOST_CHUNK_BYTES // self._reference.itemsize:,}. Write it in smaller ones, by `h5repack "
                f"-l {name}:CHUNK={min(65536, max(1, self.num_rows))} OLD.h5 NEW.h5`."
            )

    @property
    def parts(self) -> Sequence[Part]:
        """What it opens: itself."""
        return (self,)

    @property
    def dataset(self) -> h5py.Dataset:
        """The one with the references."""
        return self._dataset

    @property
    def cache_bytes(self) -> int:
        """Chunk cache to open the dataset with: for one chunk of references."""
        chunk = self._dataset.chunks
        return min(HELD_BYTES, max(SMALL_BYTES, 0 if chunk is None else chunk[0] * self._reference.itemsize))

    def read_from(self, dataset: h5py.Dataset, call: Callable[..., Any]) -> None:
        """Rows are read from `dataset`, which is the same one, opened anew."""
        self._dataset, self._call = dataset, call

    def close(self) -> None:
        """Of other files none is open."""

    def extents(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        lengths = self._references(start, stop)["length"].astype(np.int64)
        too_many = lengths > self._file_bytes // self._value_bytes
        if too_many.any():
            row = int(too_many.argmax())
            raise DataError(
                f"{self._where} has {lengths[row]:,} values of {self._value_bytes} bytes in row "
                f"{start + row}, in a file of {self._file_bytes:,} bytes. The file is damaged: copy or write "
                "it again."
            )
        return np.arange(start, stop), lengths

    def read(self, starts: Numbers, lengths: Numbers, kept: Numbers) -> Array:
        if self._heaps is None:
            self._heaps = Heaps(h5py.h5i.get_file_id(self._dataset.id), self._file_bytes)
        first = int(starts[0])
        references = self._references(first, first + len(starts))
        wide = max(self._value_bytes, self._dtype.itemsize)
        stored = bytearray(int(kept.sum()) * wide)  # converted in place
        at, target = 0, memoryview(stored)
        for row, (address, number, length, size) in enumerate(
            zip(
                references["address"].tolist(),
                references["number"].tolist(),
                (lengths * self._value_bytes).tolist(),
                (kept * self._value_bytes).tolist(),
                strict=True,
            ),
            first,
        ):
            if size:
                values = self._heaps.object(address, number)
                if len(values) != length:
                    raise ValueError(f"row {row} has {len(values)} bytes, where {length} are recorded")
                target[at : at + size] = values[:size]
                at += size
        found = self._converted(np.frombuffer(stored, np.uint8), int(kept.sum()))
        if self._packing is not None:
            found = self._by_rows(self._packing.unpack, found, kept, first)
        return found if self._encoder is None else self._by_rows(self._encoder.encode, found, kept, first)

    def _converted(self, stored: Array, num_values: int) -> Array:
        """Values as they are in the file, at the beginning of `stored` [bytes], in the type of the field."""
        kind, native = self._kind, h5py.h5t.py_create(self._dtype)
        if self._dtype.kind == "b":
            return stored[:num_values].astype(bool)
        if not kind.equal(native) and kind.get_class() != h5py.h5t.BITFIELD:
            self._call(h5py.h5t.convert, kind, native, num_values, stored)
        return stored[: num_values * self._dtype.itemsize].view(self._dtype)

    @staticmethod
    def _by_rows(action: Callable[[Array, int], Array], values: Array, kept: Numbers, first: int) -> Array:
        """What `action`, which wants the number of the first row, makes of the values of rows."""
        try:
            return action(values, first)
        except DataError:
            for row, own in enumerate(np.split(values, np.cumsum(kept)[:-1]), first):
                action(own[np.newaxis], row)  # for the number of the row
            raise

    @property
    def _reference(self) -> np.dtype[Any]:
        """As it is stored: length, address of a heap, number of an object in it."""
        address = h5py.h5i.get_file_id(self._dataset.id).get_create_plist().get_sizes()[0]
        return np.dtype([("length", "<u4"), ("address", f"<u{address}"), ("number", "<u4")])

    def _references(self, start: int, stop: int) -> Array:
        """Those of rows `start` up to `stop`."""
        if self._dataset.chunks is None:
            found: Array = self._call(self._in_one_piece, start, stop)
            return found
        size = self._dataset.chunks[0]
        pieces = [np.empty(0, self._reference)]
        for chunk in range(start // size, -(-stop // size)):
            first = chunk * size
            pieces.append(self._of_chunk(chunk)[max(0, start - first) : stop - first])
        return np.concatenate(pieces)

    def _in_one_piece(self, start: int, stop: int) -> Array:
        dataset = self._dataset.id
        if dataset.get_create_plist().get_layout() == h5py.h5d.COMPACT:
            raise UnsupportedShard(
                f"{self._where} holds rows of variable length in compact storage. Expected contiguous or "
                "chunked storage, in which their lengths can be checked: write it again, by `h5repack -l "
                f"{self._dataset.name.strip('/')}:CONTI OLD.h5 NEW.h5`."
            )
        first, size = dataset.get_offset(), self._reference.itemsize
        if first is None:  # never written
            return np.zeros(stop - start, self._reference)
        handle = h5py.h5i.get_file_id(dataset).get_vfd_handle()
        stored = os.pread(handle, (stop - start) * size, first + start * size)
        if len(stored) < (stop - start) * size:
            raise ValueError("the file ends before the last row")
        return np.frombuffer(stored, self._reference)

    def _of_chunk(self, chunk: int) -> Array:
        """The references of all rows of a chunk; those of the last one are held."""
        if self._held is None or self._held[0] != chunk:
            self._held = chunk, self._call(self._read_chunk, chunk)
        return self._held[1]

    def _read_chunk(self, chunk: int) -> Array:
        rows = self._dataset.chunks[0]
        at = (chunk * rows,)
        if self._dataset.id.get_chunk_info_by_coord(at).byte_offset is None:  # never written
            return np.zeros(rows, self._reference)
        skipped, stored = self._dataset.id.read_direct_chunk(at)
        pipeline = self._dataset.id.get_create_plist()
        filters = [pipeline.get_filter(i) for i in range(pipeline.get_nfilters()) if not skipped >> i & 1]
        if filters:
            stored = _decoded(stored, filters, rows, self._reference.itemsize)
        references = np.frombuffer(stored, self._reference)
        if len(references) != rows:
            raise ValueError(f"a chunk of {len(references)} rows, expected {rows}")
        return references


def _decoded(stored: bytes, filters: Sequence[tuple[int, int, Any, bytes]], rows: int, size: int) -> bytes:
    """What a chunk holds that passed these filters, each (number, flags, parameters, name): by way of a
    dataset of bytes with the same filters, in a file in memory."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(1 << 16, False)
    file = h5py.h5f.create(b"hvd_train-chunk-%d" % next(_numbers), h5py.h5f.ACC_EXCL, fapl=access)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((rows,))
    for number, flags, parameters, _ in filters:
        creation.set_filter(number, flags, parameters)
    kind = h5py.h5t.create(h5py.h5t.OPAQUE, size)
    dataset = h5py.h5d.create(file, b"chunk", kind, h5py.h5s.create_simple((rows,)), creation)
    dataset.write_direct_chunk((0,), stored)
    decoded = np.empty(rows, f"V{size}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, decoded, kind)
    return decoded.tobytes()
