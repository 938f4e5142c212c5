"""From places to the open fields of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, final

import h5py

from hvd_train.data import format as fmt
from hvd_train.data.crash import naming
from hvd_train.data.hdf5.chunks import reopened
from hvd_train.data.hdf5.field import Field
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.data.hdf5.links import open_dataset
from hvd_train.data.hdf5.packed import PackedRows
from hvd_train.data.hdf5.ragged import PaddedField, RaggedRows
from hvd_train.data.hdf5.recipes import is_pickled
from hvd_train.data.hdf5.types import has_rows_of_numbers
from hvd_train.data.hdf5.virtual import Virtual
from hvd_train.data.hdf5.vlen import VlenRows
from hvd_train.data.places import Place, Places
from hvd_train.errors import DataError, UnsupportedShard


@final
class Opening:
    """Opens fields of one open file.

    Args:
        path: of the shard, for messages.
        file_path: of the file on disk.
        group: that is the shard; empty where all of the file is.
        file_bytes: of the whole file.
        texts: whether strings of a fixed number of bytes are taken as well.
        linked: the files that its links lead to.
        call: what every call of HDF5 goes through, as `call(action, *args)`.

    Every method raises `DataError` for what cannot be read.
    """

    def __init__(
        self,
        file: h5py.File,
        path: str,
        file_path: str,
        group: str,
        *,
        file_bytes: int,
        texts: bool,
        linked: LinkedFiles,
        call: Callable[..., Any],
    ) -> None:
        self._file = file
        self._path = path
        self._file_path = file_path
        self._linked = linked
        self._group = group
        self._file_bytes = file_bytes
        self._texts = texts
        self._call = call

    def path_of(self, place: Place) -> str:
        """The path of the dataset, in this group."""
        path = (place.in_group(self._group) if self._group else place).dataset
        return "/".join(part for part in path.split("/") if part)

    def with_masks(self, places: Places) -> Mapping[str, Place]:
        """The places, and if `places.masks`, beside each that has rows of any length the one of its mask."""
        wanted: dict[str, Place] = {}
        for name, place in places.places.items():
            wanted[name] = place
            if places.masks and place.padding and (place.bounds or self._is_ragged(self._open(place), place)):
                mask = fmt.mask_name(name)
                if mask in places.places:
                    raise DataError(
                        f"{self._path}: `{mask}` is the name of the mask of `{name}`, whose rows are padded, "
                        "and of another field. Expected different names: give that field another one in "
                        "data.fields."
                    )
                wanted[mask] = replace(place, coding=None, padding=replace(place.padding, marks=True))
        return wanted

    def fields(self, places: Mapping[str, Place]) -> dict[str, Field | PaddedField]:
        """All of them, ready to be read."""
        fields = {name: self.field(name, place) for name, place in places.items()}
        parts = [part for field in fields.values() for part in field.parts]
        datasets = reopened([(part.dataset, part.cache_bytes) for part in parts])
        for part, dataset in zip(parts, datasets, strict=True):
            call = self._call if self._is_own(dataset) else naming(dataset.file.filename)
            part.read_from(dataset, call)
        return fields

    def field(self, name: str, place: Place) -> Field | PaddedField:
        """One of them, before it is read."""
        dataset = self._open(place)
        if place.bounds is not None:
            values = self._plain(name, dataset, place)
            numbers = Place(place.bounds.dataset, follow_links=place.follow_links)
            bounds = self._plain(name, self._open(numbers), numbers)
            for part in (values, bounds):
                part.read_from(part.dataset, self._call)
            rows: RaggedRows = PackedRows(self._path, values, bounds, place.bounds.kind)
        elif self._is_ragged(dataset, place):
            where, file_bytes = self._place_of(dataset)
            rows = VlenRows(where, dataset, place.coding, file_bytes, self._call)
        else:
            return self._plain(name, dataset, place)
        return PaddedField(self._place_of(dataset)[0], name, rows, place)

    def _plain(self, name: str, dataset: h5py.Dataset, place: Place) -> Field:
        virtual = Virtual(dataset, self._linked) if dataset.is_virtual else None
        where, file_bytes = self._place_of(dataset)
        own = self._is_own(dataset)
        return Field(
            where,
            name,
            dataset,
            place,
            file_path=self._file_path if own else dataset.file.filename,
            file_bytes=file_bytes + (virtual.num_bytes if virtual else 0),
            texts=self._texts,
            foreign=self._is_foreign if own else fmt.ATTR_SCHEMA not in dataset.file.attrs,
            virtual=virtual,
            own=own,
        )

    def _place_of(self, dataset: h5py.Dataset) -> tuple[str, int]:
        """The file that a dataset is in, for messages, and its bytes."""
        if self._is_own(dataset):
            return self._path, self._file_bytes
        return dataset.file.filename, os.path.getsize(dataset.file.filename)

    @cached_property
    def attributes(self) -> h5py.AttributeManager:
        """Those of the file."""
        return self._file.attrs

    @cached_property
    def _is_foreign(self) -> bool:
        return fmt.ATTR_SCHEMA not in self.attributes

    def _is_own(self, dataset: h5py.Dataset) -> bool:
        # h5py makes an object for every file that is asked for.
        return not self._linked.follow or dataset.file == self._file

    def _open(self, place: Place) -> h5py.Dataset:
        return open_dataset(self._file, self.path_of(place), self._path, self._linked)

    def _is_ragged(self, dataset: h5py.Dataset, place: Place) -> bool:
        if dataset.is_virtual or is_pickled(dataset):
            return False
        if len(dataset.shape) > 1 or place.columns or not has_rows_of_numbers(dataset.id.get_type()):
            return False
        if place.cut:
            raise UnsupportedShard(
                f"{self._path}: dataset `{self.path_of(place)}` holds rows of variable length, and a part of "
                f"each is named: `{place}`. Expected the dataset alone: set data.max_length to the number of "
                "values that are read of each row, and data.truncate = true to cut longer ones."
            )
        return True
