"""From the values of targets in a file to class numbers. Pure functions of arrays; nothing is read here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, final

import numpy as np

from hvd_train.data.format import Array, Coding
from hvd_train.data.labels import IGNORED
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown

_WHOLE = re.compile(r"[+-]?\d{1,19}")
_INT64 = np.iinfo(np.int64)


@final
class Encoder:
    """Makes class numbers of the values of one dataset.

    Args:
        coding: how.
        dtype: of the values: booleans, integers, floating-point numbers, or strings (`S12`, or objects of
            bytes in UTF-8).
        shape: of a sample of them.
        where: the dataset, for messages.

    Raises `DataError` for a coding that such values cannot have.
    """

    def __init__(self, coding: Coding, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> None:
        self._where = where
        self._is_text = dtype.kind in "SO"
        self.shape = shape[:-1] if coding.one_hot else shape
        """Of a sample of class numbers."""
        if coding.one_hot:
            coding = self._one_hot(coding, shape)
        self.coding = coding
        """As it was given; of one-hot vectors always with a name for each component."""
        self._texts = {name.encode(): number for number, name in enumerate(coding.names)}
        if coding.ignored is not None:
            self._texts[str(coding.ignored).encode()] = IGNORED
        if self._is_text and not coding.names:
            raise DataError(
                f"{where} holds strings; expected data.classes to list those that are classes. Set it."
            )
        numbers = [] if self._is_text or coding.one_hot else self._numbers(coding.names, dtype)
        self._order = np.argsort(np.array(numbers, np.int64))
        self._sorted = np.array(numbers, np.int64)[self._order]

    def encode(self, values: Array, first_row: int) -> Array:
        """The class numbers of `values` [rows, ...], int64; `IGNORED` for those without a class.

        Args:
            first_row: number of the first row.

        Raises `DataError` for the first value that is neither.
        """
        if self.coding.one_hot:
            ones = values == 1
            numbers: Array = ones.argmax(axis=-1)
            wrong = (ones.sum(axis=-1) != 1) | ~(ones | (values == 0)).all(axis=-1)
        elif self._is_text:
            found = [self._texts.get(value, -1) for value in values.reshape(-1).tolist()]
            numbers = np.array(found, np.int64).reshape(values.shape)
            wrong = numbers == -1
        else:
            numbers, wrong = self._of_numbers(values)
        if wrong.any():
            at = tuple(int(indices[0]) for indices in np.nonzero(wrong))
            raise DataError(self._refusal(values[at], first_row + at[0]))
        return numbers

    def _of_numbers(self, values: Array) -> tuple[Array, Array]:
        """The class numbers, and where there is none."""
        fits = np.ones(values.shape, bool)
        if values.dtype.kind == "f":
            # 2 ** 63 is the first whole number above those of int64.
            fits = (values == np.floor(values)) & (np.abs(values) < np.float64(2.0**63))
        elif values.dtype == np.uint64:
            fits = values <= _INT64.max
        whole = np.where(fits, values, 0).astype(np.int64)
        known, numbers = fits, whole
        if self.coding.names:
            place = np.minimum(np.searchsorted(self._sorted, whole), len(self._sorted) - 1)
            known, numbers = fits & (self._sorted[place] == whole), self._order[place].astype(np.int64)
        ignored = IGNORED if self.coding.ignored is None else self.coding.ignored
        marked = fits & ((whole == IGNORED) | (whole == ignored))
        if self.coding.names:
            marked &= ~known
        return np.where(marked, IGNORED, numbers), ~(known | marked)

    def _numbers(self, names: tuple[str, ...], dtype: np.dtype[Any]) -> list[int]:
        """The values that are named."""
        numbers: dict[int, str] = {}
        for name in names:
            number = int(name) if _WHOLE.fullmatch(name) else None
            if number is None or not _INT64.min <= number <= _INT64.max or number in numbers:
                raise DataError(
                    f"{self._where} holds {dtype}, but data.classes has `{shown(name)}`; expected whole "
                    "numbers, each once. List the values that are classes, or name another dataset in "
                    "data.targets."
                )
            numbers[number] = name
        return list(numbers)

    def _one_hot(self, coding: Coding, shape: tuple[int, ...]) -> Coding:
        count, names = shape[-1] if shape else 0, coding.names
        if count < 2 or self._is_text or len(names) not in (0, count):
            named = f" and data.classes has {len(names)} names" if names else ""
            raise DataError(
                f"{self._where} has the shape {list(shape)} a sample{named}; expected a number for each "
                "class along the last axis, as data.one_hot says. Correct them, or name another dataset in "
                "data.targets."
            )
        return replace(coding, names=names or tuple(map(str, range(count))))

    def _refusal(self, value: Any, row: int) -> str:
        if self.coding.one_hot:
            return (
                f"{self._where} holds {shown(str(np.asarray(value).tolist()))} in row {row}; expected one "
                "1 among zeros, as data.one_hot says. Leave out such rows, or take task = 'regression' "
                "without data.one_hot."
            )
        if not self.coding.names:
            return (
                f"{self._where} holds {value} in row {row}; expected whole numbers of classes. Leave out "
                "such rows, or take task = 'regression' without data.ignore_index."
            )
        seen = f"`{shown(value.decode(errors='backslashreplace'))}`" if self._is_text else str(value)
        named = listed([f"`{shown(name)}`" for name in self.coding.names])
        return (
            f"{self._where} holds {seen} in row {row}; expected one of data.classes: {named}. Add it there, "
            "set data.ignore_index if it marks targets without a class, or leave out such rows."
        )
