"""How a dataset that cannot be read as it is can be written again, as statements for h5py and NumPy."""

from __future__ import annotations

import re
from typing import Any

import h5py
import numpy as np

from hvd_train.data.hdf5.types import columns, element_type, is_complex, is_table, numpy_dtype

_NAMEABLE = re.compile(r"[^\[\],:\s\d][^\[\],:]{0,60}")
"""A column that a place in a file can name."""


def by_h5py(statements: str) -> str:
    """The end of a sentence that begins with what is written again."""
    return (
        f"with h5py, from an open file `old` to a new one, `new`: `{statements}`. Copy the other datasets to "
        "the new file as well."
    )


def conversion(dataset: h5py.Dataset, name: str) -> str:
    """What to do about `dataset`, the values of which are of a type that `numpy_dtype` refuses."""
    if is_pickled(dataset):
        return (
            "They are Python objects, which PyTables or pandas pickled: to load them could run any program, "
            "so it is not done. Write them again as numbers; of a DataFrame, with format='table', "
            "data_columns=True."
        )
    kind, key = dataset.id.get_type(), repr(name)
    values = f"values = old[{key}][...]"
    if is_table(kind):
        return _from_columns(kind, name)
    if is_complex(kind):
        parts = f"{values}; new[{key}] = np.stack([values.real, values.imag], -1)"
        return f"Write real and imaginary parts, {by_h5py(parts)}"
    if isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeEnumID, h5py.h5t.TypeFloatID)):
        return f"Convert it, {by_h5py(_converted(kind, key))}"
    if isinstance(kind, h5py.h5t.TypeBitfieldID):
        return f"Write it as integers, {by_h5py(f'new[{key}] = old[{key}][...]')}"
    if isinstance(kind, h5py.h5t.TypeOpaqueID):
        as_bytes = f"{values}; new[{key}] = values.view(np.uint8).reshape(*values.shape, -1)"
        return f"Write its bytes, {by_h5py(as_bytes)}"
    if rows := from_rows(kind, f"old[{key}][...]", sum(length > 1 for length in dataset.shape)):
        return rows
    if dataset.ndim == 1:
        return _from_values_of_their_own(kind, key)
    return _AS_NUMBERS


def is_pickled(dataset: h5py.Dataset) -> bool:
    """Whether it holds Python objects, as rows of bytes."""
    return "PSEUDOATOM" in dataset.attrs and dataset.attrs["PSEUDOATOM"] in (b"object", "object")


_AS_NUMBERS = "Write it again as numbers."


def _from_values_of_their_own(kind: Any, key: str) -> str:
    """Of one axis, the values of which are stored one by one."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        numbers = f"new[{key}] = np.unique(old[{key}].asstr()[...], return_inverse=True)[1]"
        return (
            "If they are classes, list them in data.classes, or write the numbers of the classes, "
            f"{by_h5py(numbers)}"
        )
    for reference, read in ((h5py.h5t.STD_REF_OBJ, "..."), (h5py.h5t.STD_REF_DSETREG, "ref")):
        if kind.equal(reference):
            values = f"new[{key}] = np.stack([old[ref][{read}] for ref in old[{key}][...]])"
            return f"Write the values that they refer to, {by_h5py(values)}"
    return _AS_NUMBERS


def from_rows(kind: Any, rows: str, num_axes: int = 1) -> str:
    """What to do about rows of variable length of numbers that are in a table, a virtual dataset, along
    several axes, or have columns: as values and offsets. Empty for others.

    Args:
        kind: their type.
        rows: the expression that reads them, of `num_axes` axes that are longer than 1.
    """
    if kind.get_class() != h5py.h5t.VLEN or num_axes > 1:
        return ""
    inner = kind.get_super()
    if is_table(inner) or not isinstance(numpy_dtype(inner), np.dtype) or not inner.dtype.isnative:
        return ""
    packed = (
        f"rows = {rows}.reshape(-1); new['values'] = np.concatenate(rows); "
        "new['offsets'] = np.cumsum([0, *map(len, rows)])"
    )
    return f"Write them as values and offsets, and name them `packed(values, offsets)`, {by_h5py(packed)}"


def _from_columns(kind: Any, name: str) -> str:
    numbers = [column for column, values in columns(kind) if isinstance(element_type(values)[0], np.dtype)]
    names = [column for column in numbers if _NAMEABLE.fullmatch(column)][:2]
    return f"Name the columns to read, such as `{name}[{','.join(names)}]`." if names else _AS_NUMBERS


def _converted(kind: Any, key: str) -> str:
    """By the conversion of the HDF5 library: NumPy has no such type."""
    if isinstance(kind, h5py.h5t.TypeFloatID):
        dtype, memory = "f8", "NATIVE_DOUBLE"
    else:
        dtype, memory = ("i8", "NATIVE_INT64") if _is_signed(kind) else ("u8", "NATIVE_UINT64")
    return (
        f"values = np.empty(old[{key}].shape, {dtype!r}); "
        f"old[{key}].id.read(h5py.h5s.ALL, h5py.h5s.ALL, values, h5py.h5t.{memory}); new[{key}] = values"
    )


def _is_signed(kind: Any) -> bool:
    return bool((kind.get_super() if isinstance(kind, h5py.h5t.TypeEnumID) else kind).get_sign())
