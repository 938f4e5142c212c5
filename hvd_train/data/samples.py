"""Samples of a program, which must all have the same fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np

from hvd_train.data.format import Array, FieldSpec
from hvd_train.errors import DataError


@final
class Samples:
    """Compares samples with the first one, or with what was given.

    Args:
        fields: dtype and shape of each; None: those of the first samples.
        required: fields that there must be.

    Raises `DataError`.
    """

    def __init__(
        self, fields: Mapping[str, tuple[str, tuple[int, ...]]] | None, required: tuple[str, ...]
    ) -> None:
        self._required = required
        self._is_given = fields is not None
        self._rows = 0
        self.fields: dict[str, FieldSpec] = {}
        """Of a sample; empty until it is known."""
        for name, (dtype, shape) in (fields or {}).items():
            self.fields[name] = FieldSpec(shape=tuple(shape), dtype=_number(np.dtype(dtype), name).name)
        if fields is not None:
            self._require(self.fields, "fields")

    def take(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """The next samples, [samples, ...] of each field, in the types of `fields`."""
        arrays = {name: self.array(name, value) for name, value in batch.items()}
        where = f"row {self._rows}"
        lengths = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or -1 in lengths.values():
            raise DataError(f"{where}: fields of lengths {lengths}. Expected one row a sample in each field.")
        if not self.fields:
            self._require(arrays, where)
            self.fields = {
                name: FieldSpec(shape=array.shape[1:], dtype=_number(array.dtype, f"{where}: `{name}`").name)
                for name, array in arrays.items()
            }
        if arrays.keys() != self.fields.keys():
            raise DataError(
                f"{where}: a sample has the fields {_names(arrays)}. Expected {_names(self.fields)}, as in "
                "the "
                "first."
            )
        block = {name: self._converted(name, arrays[name], where) for name in self.fields}
        self._rows += next(iter(lengths.values()))
        return block

    def array(self, name: str, value: Any) -> Array:
        """The values of field `name` of the next samples. Raises `DataError` if they are no array."""
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            array = np.empty(0, object)
        if array.dtype.kind == "O":
            raise DataError(
                f"row {self._rows}: `{name}` has values of different lengths, or Python objects. Expected "
                "numbers: pad the values to one length, or convert them."
            )
        return array

    def _converted(self, name: str, array: Array, where: str) -> Array:
        field = self.fields[name]
        dtype = np.dtype(field.dtype)
        fits = np.can_cast(array.dtype, dtype, "same_kind" if self._is_given else "no")
        # A Python integer is int64, and fits into a smaller type if its value does.
        whole = array.dtype.kind in "iu" and dtype.kind in "iu" and self._is_given
        converted = array.astype(dtype) if fits or whole else array
        if whole:
            fits = bool((converted == array).all())
        if not fits or array.shape[1:] != field.shape:
            expected = "as `fields` says" if self._is_given else "as in row 0"
            raise DataError(
                f"{where}: `{name}` is {array.dtype} {list(array.shape[1:])}. Expected {field}, {expected}: "
                "convert, pad or cut it."
            )
        return converted

    def _require(self, names: Mapping[str, Any], where: str) -> None:
        missing = [name for name in self._required if name not in names]
        if missing:
            raise DataError(
                f"{where}: there is no field `{missing[0]}` in {_names(names)}. Expected inputs and targets: "
                "give their names as `inputs` and `targets`."
            )


def _number(dtype: np.dtype[Any], where: str) -> np.dtype[Any]:
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(
            f"{where} is {dtype}. Expected integers, floating-point numbers up to 64 bits, or booleans: "
            "convert "
            "it."
        )
    return dtype


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in fields)
