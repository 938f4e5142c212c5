"""Which HDF5 types a sample may have. They are checked here, before any value is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_train.io.text import listed, shown

# H5T_class_t, which is part of the file format.
_INTEGER, _FLOAT, _STRING, _BITFIELD, _COMPOUND, _ENUM, _VLEN, _ARRAY, _COMPLEX = 0, 1, 3, 4, 6, 8, 9, 10, 11
_OTHERS = {
    2: "times (H5T_TIME)",
    _STRING: "strings",
    5: "opaque values",
    7: "references",
    _ARRAY: "arrays as values",
    _COMPLEX: "complex numbers",
}
_STANDARD_FLOATS = {
    # bytes, precision, (sign, exponent at, exponent bits, mantissa at, mantissa bits), bias
    (2, 16, (15, 10, 5, 0, 10), 15): "float16",
    (4, 32, (31, 23, 8, 0, 23), 127): "float32",
    (8, 64, (63, 52, 11, 0, 52), 1023): "float64",
    (2, 16, (15, 7, 8, 0, 7), 127): "float32",  # bfloat16: every value of it is a float32
    (16, 80, (79, 64, 15, 0, 64), 16383): "float64",  # long double of x86: converted by HDF5
}


def numpy_dtype(type_id: Any) -> np.dtype[Any] | str:
    """The dtype in which values of an HDF5 type (h5py's TypeID) are read, in native byte order; or what
    they are, in words, for a type that no batch can hold."""
    kind, num_bytes = type_id.get_class(), type_id.get_size()
    if kind == _INTEGER:
        return _whole_number(type_id, num_bytes)
    if kind == _FLOAT:
        return _floating_point(type_id, num_bytes)
    if kind == _BITFIELD:
        return np.dtype("uint8") if num_bytes == 1 else f"bit fields of {8 * num_bytes} bits"
    if kind == _ENUM:
        values = numpy_dtype(type_id.get_super())
        # h5py has booleans as an enumeration of FALSE and TRUE.
        return np.dtype(bool) if not isinstance(values, str) and type_id.dtype == bool else values
    if kind == _COMPOUND:
        names = [f"`{shown(name)}`" for name, _ in columns(type_id)]
        return _OTHERS[_COMPLEX] if is_complex(type_id) else f"compound values ({listed(names)})"
    if kind == _VLEN:
        return f"rows of variable length ({numpy_dtype(type_id.get_super())})"
    return _OTHERS.get(kind, f"values of an unknown type (class {kind})")


def columns(type_id: Any) -> list[tuple[str, Any]]:
    """The names of the columns of a compound type, and their types."""
    return [
        (type_id.get_member_name(i).decode(errors="backslashreplace"), type_id.get_member_type(i))
        for i in range(type_id.get_nmembers())
    ]


def is_complex(type_id: Any) -> bool:
    """Whether values are complex numbers: those of HDF5 2.0, or h5py's compound of `r` and `i`."""
    if type_id.get_class() != _COMPOUND:
        return bool(type_id.get_class() == _COMPLEX)
    return [(name, kind.get_class()) for name, kind in columns(type_id)] == [("r", _FLOAT), ("i", _FLOAT)]


def element_type(type_id: Any) -> tuple[np.dtype[Any] | str, tuple[int, ...]]:
    """As `numpy_dtype`, of the values of an HDF5 type, and the shape of arrays of them that it may be."""
    if type_id.get_class() != _ARRAY:
        return numpy_dtype(type_id), ()
    dtype, inner = element_type(type_id.get_super())
    return dtype, (*map(int, type_id.get_array_dims()), *inner)


def is_table(type_id: Any) -> bool:
    """Whether values are compound, with columns of their own."""
    return bool(type_id.get_class() == _COMPOUND) and not is_complex(type_id)


def has_rows_of_numbers(type_id: Any) -> bool:
    """Whether values are rows of variable length, of numbers or booleans that a batch can hold."""
    return bool(type_id.get_class() == _VLEN) and isinstance(numpy_dtype(type_id.get_super()), np.dtype)


def is_text(type_id: Any) -> bool:
    """Whether values are strings, of fixed or variable length."""
    return bool(type_id.get_class() == _STRING)


def text_dtype(type_id: Any) -> np.dtype[Any] | None:
    """The dtype of strings of a fixed number of bytes, such as `S12`; None for any other type."""
    if not is_text(type_id) or type_id.is_variable_str():
        return None
    return np.dtype(f"S{type_id.get_size()}")


def _whole_number(type_id: Any, num_bytes: int) -> np.dtype[Any] | str:
    if num_bytes not in (1, 2, 4, 8):
        return f"integers of {8 * num_bytes} bits"
    return np.dtype(f"{'i' if type_id.get_sign() else 'u'}{num_bytes}")


def _floating_point(type_id: Any, num_bytes: int) -> np.dtype[Any] | str:
    fields = tuple(map(int, type_id.get_fields()))
    layout = (num_bytes, type_id.get_precision(), fields, type_id.get_ebias())
    if layout in _STANDARD_FLOATS:
        return np.dtype(_STANDARD_FLOATS[layout])
    return (
        f"floating-point numbers of {layout[1]} bits with {fields[2]} of exponent and {fields[4]} of mantissa"
    )
