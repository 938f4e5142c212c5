"""Which columns of a table become which fields, and their values as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import numpy as np

from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import GROUP, INPUTS, TARGETS, group_numbers
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown


@dataclass(frozen=True)
class Chosen:
    """The columns of each field."""

    columns: Mapping[str, tuple[str, ...]]
    """Of one column a field has the values, of several the values side by side."""
    classes: tuple[str, ...]
    """Texts in the targets that are classes, in the order of their numbers; empty for numbers."""

    @property
    def all(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys(column for columns in self.columns.values() for column in columns))

    def is_text(self, column: str) -> bool:
        """Whether the column is read as text."""
        coded = bool(self.classes) and column in self.columns[TARGETS]
        return coded or column in self.columns.get(GROUP, ())


def choose(
    there: Sequence[str], names: Mapping[str, str], group: str, classes: tuple[str, ...], path: str
) -> Chosen:
    """The columns that `names` stand for: `x`, `x,y`, or a pattern such as `pixel*`. Where the inputs are not
    named, and no column is called so, they are all columns that are not used otherwise. Raises
    `DataError`."""
    wanted = {**names, **({GROUP: group} if group else {})}
    rest = wanted[INPUTS] == INPUTS and INPUTS not in there
    columns = {
        field: tuple(c for part in text.split(",") for c in _matching(part.strip(), there, field, path))
        for field, text in wanted.items()
        if field != INPUTS or not rest
    }
    if rest:
        used = {column for chosen in columns.values() for column in chosen}
        columns = {INPUTS: tuple(column for column in there if column not in used), **columns}
        if not columns[INPUTS]:
            raise DataError(f"{path}: no column is left for the inputs. Name them with --inputs.")
    if classes and len(columns[TARGETS]) != 1:
        raise DataError(f"{path}: --classes, but --targets names {len(columns[TARGETS])} columns. Name one.")
    return Chosen(columns, classes)


def _matching(text: str, there: Sequence[str], field: str, path: str) -> list[str]:
    found = [text] if text in there else [column for column in there if fnmatchcase(column, text)]
    if not found:
        option = {INPUTS: "--inputs", TARGETS: "--targets", GROUP: "--group"}.get(field, "--fields")
        seen = listed([f"`{shown(column)}`" for column in there])
        raise DataError(f"{path}: no column `{text}`; the file has {seen}. Name others with {option}.")
    return found


@final
class Converter:
    """Makes arrays of the columns of a table, with the same shape and type of a row in all of them.

    Args:
        dtypes: of each column that is read as numbers.
    """

    def __init__(self, chosen: Chosen, dtypes: Mapping[str, str], path: str) -> None:
        self._chosen = chosen
        self._dtypes = dtypes
        self._path = path
        self._numbers = {name: number for number, name in enumerate(chosen.classes)}
        self._lengths: dict[str, int] = {}

    def fields(self, first: Mapping[str, Any]) -> dict[str, FieldSpec]:
        """Of a row, by the columns of the first rows, not empty."""
        arrays = self.block(first, 0)
        return {
            name: FieldSpec(shape=array.shape[1:], dtype=array.dtype.name)
            for name, array in arrays.items()
            if name != GROUP
        }

    def block(self, columns: Mapping[str, Any], first_row: int) -> dict[str, Array]:
        """The fields of rows: `columns` are pyarrow's arrays. Raises `DataError`."""
        block = {}
        for field, names in self._chosen.columns.items():
            if not set(names) <= set(columns):
                continue
            arrays = [self._column(name, columns[name], first_row, field) for name in names]
            if len(arrays) == 1:
                block[field] = arrays[0]
            else:
                block[field] = np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)
        return block

    def _column(self, name: str, values: Any, first_row: int, field: str) -> Array:
        if values.null_count:
            row = first_row + values.is_null().to_numpy(zero_copy_only=False).argmax()
            raise DataError(
                f"{self._path}: row {row}: the value of column `{name}` is missing. Expected one in every "
                "row: fill it in, or leave out such rows."
            )
        if field == GROUP:
            return group_numbers(np.asarray(values.to_pylist()), f"{self._path}: column `{name}`")
        if self._chosen.is_text(name):
            return self._classes(name, values, first_row)
        if hasattr(values, "flatten") and hasattr(values.type, "value_type"):
            return self._lists(name, values, first_row)
        return np.asarray(values.to_numpy(zero_copy_only=False), self._dtypes[name])

    def _classes(self, name: str, values: Any, first_row: int) -> Array:
        numbers = np.array([self._numbers.get(text, -1) for text in values.to_pylist()], np.int64)
        wrong = np.flatnonzero(numbers < 0)
        if len(wrong):
            row = int(wrong[0])
            known = listed([f"`{text}`" for text in self._chosen.classes])
            raise DataError(
                f"{self._path}: row {first_row + row}: column `{name}` holds `{shown(values[row].as_py())}`. "
                f"Expected one of --classes: {known}. Add it there, or leave out such rows."
            )
        return numbers

    def _lists(self, name: str, values: Any, first_row: int) -> Array:
        """A vector from each row."""
        flat = values.flatten()
        if flat.null_count:
            raise DataError(
                f"{self._path}: rows {first_row} to {first_row + len(values) - 1}: a value in a list of "
                f"column `{name}` is missing. Expected numbers: fill it in, or leave out such rows."
            )
        lengths = np.array([len(row) for row in values], np.int64)
        length = self._lengths.setdefault(name, int(lengths[0]))
        wrong = np.flatnonzero(lengths != length)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self._path}: row {first_row + row}: column `{name}` has {lengths[row]} values, but "
                f"{length} in row 0. Expected as many in every row: pad or cut them."
            )
        array = np.asarray(flat.to_numpy(zero_copy_only=False), self._dtypes[name])
        return array.reshape(len(values), length)


def text_refusal(path: str, row: int, column: str, value: str) -> str:
    """The message for text in a column that is read as numbers."""
    return (
        f"{path}: row {row}: column `{column}` holds `{shown(value)}`. Expected a number. If these are "
        "classes, name the column in --targets and list its texts in --classes; else name other columns in "
        "--inputs."
    )
