"""The samples of a Python dataset: read by their numbers, or iterated over in each pass."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import final

from hvd_train.data.format import Coding, FieldSpec
from hvd_train.data.places import Place, Places
from hvd_train.data.python.fields import Fields
from hvd_train.data.python.registry import make
from hvd_train.data.sources.base import (
    GROUP,
    INPUTS,
    TARGETS,
    Block,
    Source,
    group_numbers,
    rows_of_block,
)
from hvd_train.errors import DataError
from hvd_train.io.user_module import split_name


@final
class PythonDataset(Source):
    """The samples of `file.py:make_dataset` or `package.module:make_dataset`.

    Args:
        names: what a sample calls each field.
        group: the field that says to which group a row belongs; empty for none.
        classes: names of the classes, in the order of their numbers: the texts in the targets, or what
            targets that are numbers stand for. Default: those of the dataset's attribute `classes`.

    Raises `DataError`.
    """

    def __init__(
        self, name: str, names: Mapping[str, str], group: str = "", classes: tuple[str, ...] = ()
    ) -> None:
        parts = split_name(name)
        if parts is None:
            raise DataError(
                f"--from {name}: expected `file.py:make_dataset` or `package.module:make_dataset`. Name the "
                "function that makes the dataset."
            )
        self._file = parts[0]
        self._made = make(name, "--from")
        places = {field: Place(key) for field, key in names.items()}
        self._class_names = classes or self._made.class_names
        form = self._made.forms.get(names[TARGETS])
        if classes and form is not None and form.dtype == "object":
            places[TARGETS] = Place(names[TARGETS], coding=Coding(names=classes))
        if group:
            places[GROUP] = Place(group)
        if self._made.known_length is not None:
            self._made.settle(names[TARGETS])
        self._fields = Fields(name, self._made.forms, Places(places, INPUTS, TARGETS), (GROUP,), "--")
        self._names = list(places)

    @property
    def name(self) -> str:
        return self._made.name

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {n: FieldSpec(shape=f.shape, dtype=f.dtype) for n, f in self._fields.specs.items()}

    @property
    def num_rows(self) -> int | None:
        return self._made.known_length

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    @property
    def files(self) -> Collection[str]:
        return [self._file] if os.path.isfile(self._file) else []

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        wanted = [name for name in self._names if not names or name in names]
        keys = self._fields.keys_of(wanted)
        for values in self._made.blocks(keys, rows_of_block(self.fields), start):
            block = {name: self._fields.convert(values, name, start) for name in wanted}
            if GROUP in block:
                block[GROUP] = group_numbers(block[GROUP], f"{self.name}: --group")
            yield block
            start += len(block[wanted[0]])
