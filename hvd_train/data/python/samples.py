"""What one sample of a Python dataset is: arrays by name. Tensors are known by their methods: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hvd_train.data.facts import digest, digest_of
from hvd_train.data.format import Array, FieldSpec
from hvd_train.errors import DataError
from hvd_train.io.text import listed

INPUTS, TARGETS = "inputs", "targets"
"""The names in a sample that is a pair, or one array."""

_EXPECTED = "expected (inputs, targets), a dict of named fields, or one array"
_VALUES = "a tensor, an array, a number, a bool or an image"


class Unfit(Exception):
    """What is wrong with a sample, or with a value in it: the end of a message."""


def parts_of(sample: Any) -> Mapping[str, Any]:
    """The fields of a sample by name, as they are. Raises `Unfit`."""
    if isinstance(sample, Mapping):
        if not sample or any(not isinstance(name, str) for name in sample):
            raise Unfit(f"is a dict with the keys {list(sample)}; {_EXPECTED}. Name the fields.")
        return sample
    if isinstance(sample, (tuple, list)):
        if len(sample) != 2:
            raise Unfit(f"has {len(sample)} parts; {_EXPECTED}. Return one of these.")
        return {INPUTS: sample[0], TARGETS: sample[1]}
    return {INPUTS: sample}


def array_of(value: Any) -> Array:
    """A value of a field as an array of numbers or booleans in native byte order, or of one object, bytes in
    UTF-8, for text. Raises `Unfit`."""
    if isinstance(value, (str, bytes)):
        text: Array = np.empty((), object)
        text[()] = value.encode() if isinstance(value, str) else value
        return text
    try:
        array = np.asarray(value.detach() if hasattr(value, "detach") else value)
    except Exception as error:  # such as half types that numpy lacks, and rows of unequal lengths
        raise Unfit(
            f"is a {type(value).__name__} without an array: {error}. Expected {_VALUES}: convert it."
        ) from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        seen = "" if array.dtype == object else f" of {array.dtype}"
        raise Unfit(f"is a {type(value).__name__}{seen}. Expected {_VALUES}: convert it.")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class Forms:
    """Shape and dtype of every field, as the first sample has them; `DataError` for another sample.

    Args:
        name: the dataset.
        first: its first sample.
    """

    def __init__(self, name: str, first: Any) -> None:
        self._name = name
        try:
            parts = parts_of(first)
        except Unfit as why:
            raise DataError(f"{self._where(0)} {why}") from why
        arrays = {key: self._array(parts, 0, key) for key in parts}
        self.by_key: Mapping[str, FieldSpec] = {
            key: FieldSpec(shape=array.shape, dtype=array.dtype.name) for key, array in arrays.items()
        }
        self._kinds = {key: (array.dtype, array.shape) for key, array in arrays.items()}

    def empty(self, keys: Iterable[str], rows: int) -> dict[str, Array]:
        """Uninitialised arrays of so many samples."""
        forms = {key: self.by_key[key] for key in keys}
        return {key: np.empty((rows, *form.shape), form.dtype) for key, form in forms.items()}

    def take(self, sample: Any, index: int, keys: Iterable[str]) -> dict[str, Array]:
        """Some fields of the sample of this number."""
        try:
            parts = parts_of(sample)
        except Unfit as why:
            raise DataError(f"{self._where(index)} {why}") from why
        arrays = {}
        for key in keys:
            if key not in parts:
                raise DataError(
                    f"{self._where(index)} has the fields {quoted(parts)}. Expected `{key}`, as in sample 0: "
                    "return the same fields for every sample."
                )
            array = arrays[key] = self._array(parts, index, key)
            if (array.dtype, array.shape) != self._kinds[key]:
                seen = FieldSpec(shape=array.shape, dtype=array.dtype.name)
                raise DataError(
                    f"{self._where(index, key)} is {_words(seen)}. Expected {_words(self.by_key[key])}, as "
                    "in sample 0: convert, pad or cut it."
                )
        return arrays

    def _array(self, parts: Mapping[str, Any], index: int, key: str) -> Array:
        try:
            return array_of(parts[key])
        except Unfit as why:
            raise DataError(f"{self._where(index, key)} {why}") from why

    def _where(self, index: int, key: str = "") -> str:
        return f"{self._name}: `{key}` of sample {index}" if key else f"{self._name}: sample {index}"


def quoted(names: Mapping[str, Any]) -> str:
    """Names of fields, for messages."""
    return listed([f"`{name}`" for name in names])


def in_words(forms: Mapping[str, FieldSpec]) -> str:
    """The fields of a sample."""
    return ", ".join(f"`{key}` {_words(form)}" for key, form in forms.items())


def digest_of_values(values: Array) -> str:
    """Of numbers, booleans or texts."""
    return digest(repr(values.tolist()).encode()) if values.dtype == object else digest_of(values)


def _words(form: FieldSpec) -> str:
    return "text" if form.dtype == "object" else str(form)
