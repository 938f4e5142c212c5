"""Every type that HDF5 has: read in a numpy type, or refused by its name before a value is read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t

from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import plain
from hvd_train.errors import DataError


def custom_float(size: int, fields: tuple[int, int, int, int, int], bias: int) -> Any:
    kind = h5t.IEEE_F64LE.copy()
    if size > kind.get_size():
        kind.set_size(size)
        kind.set_precision(8 * size)
    kind.set_fields(*fields)
    kind.set_size(size)
    kind.set_ebias(bias)
    return kind


def integer(size: int, precision: int) -> Any:
    kind = h5t.STD_U64LE.copy()
    if size > 8:
        kind.set_size(size)
    kind.set_precision(precision)
    kind.set_size(size)
    return kind


def enumeration(base: Any, **names: int) -> Any:
    kind = h5t.enum_create(base)
    for name, value in names.items():
        kind.enum_insert(name.encode(), value)
    return kind


def write(path: Path, kind: Any, raw: bytes, *shape: int) -> Path:
    """A dataset `inputs` of this type and shape, with these bytes as its values."""
    with h5py.File(path, "w") as file:
        dataset = h5d.create(file.id, b"inputs", kind, h5s.create_simple(shape))
        if raw:
            dataset.write(h5s.ALL, h5s.ALL, np.frombuffer(raw, np.uint8), mtype=kind)
    return path


LONG = np.array([1.25, np.pi, -3], np.longdouble)


@pytest.mark.parametrize(
    ("kind", "raw", "dtype", "values"),
    [
        (h5t.STD_I8BE, struct.pack("3b", 1, -2, 3), "int8", [1, -2, 3]),
        (h5t.STD_I16BE, struct.pack(">3h", 1, -2, 300), "int16", [1, -2, 300]),
        (h5t.STD_U64BE, struct.pack(">2Q", 1, 2**63), "uint64", [1, 2**63]),
        (integer(2, 12), struct.pack("<2H", 5, 4095), "uint16", [5, 4095]),
        (h5t.IEEE_F16BE, np.array([1.5, -2], ">f2").tobytes(), "float16", [1.5, -2]),
        (h5t.IEEE_F16LE, np.array([1.5, -2], "<f2").tobytes(), "float16", [1.5, -2]),
        (h5t.IEEE_F32BE, np.array([1.5, -2], ">f4").tobytes(), "float32", [1.5, -2]),
        (h5t.IEEE_F64BE, np.array([1.5, -2], ">f8").tobytes(), "float64", [1.5, -2]),
        (custom_float(2, (15, 7, 8, 0, 7), 127), struct.pack("<2H", 0x3FC0, 0xC000), "float32", [1.5, -2]),
        (h5t.STD_B8LE, bytes([0, 1, 255]), "uint8", [0, 1, 255]),
        (enumeration(h5t.STD_I8LE, cat=0, dog=5), bytes([0, 5]), "int8", [0, 5]),
        (enumeration(h5t.STD_U16BE, cat=0, dog=500), struct.pack(">2H", 0, 500), "uint16", [0, 500]),
        (enumeration(h5t.STD_I8LE, FALSE=0, TRUE=1), bytes([1, 0]), "bool", [True, False]),
        pytest.param(
            h5t.NATIVE_LDOUBLE,
            LONG.tobytes(),
            "float64",
            LONG.astype(np.float64).tolist(),
            marks=pytest.mark.skipif(LONG.itemsize != 16, reason="long double is another type here"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read(tmp_path: Path, kind: Any, raw: bytes, dtype: str, values: list[Any]) -> None:
    path = write(tmp_path / "a.h5", kind, raw, len(values))
    with ShardFile(path, plain(("inputs",))) as shard:
        assert shard.info.fields["inputs"].dtype == dtype
        rows = shard.read("inputs", 0, len(values))
        assert rows.dtype == np.dtype(dtype)
        assert rows.tolist() == values


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (h5t.UNIX_D64LE, r"times \(H5T_TIME\)"),
        (h5t.C_S1, "strings"),
        (h5t.STD_B16LE, "bit fields of 16 bits"),
        (h5t.create(h5t.OPAQUE, 4), "opaque values"),
        (h5t.STD_REF_OBJ, "references"),
        (h5t.STD_REF_DSETREG, "references"),
        (h5t.vlen_create(h5t.C_S1), r"rows of variable length \(strings\)"),
        (h5t.array_create(h5t.vlen_create(h5t.STD_I32LE), (3,)), "(rows of variable|arrays as values)"),
        (h5t.py_create(np.dtype("c8")), "complex numbers"),
        (h5t.py_create(np.dtype([("a", "f4"), ("b", "i8")])), r"compound values \(`a`, `b`\)"),
        (h5t.py_create(np.dtype([("r", "f4"), ("j", "f4")])), r"compound values \(`r`, `j`\)"),
        (h5t.STD_B64BE, "bit fields of 64 bits"),
        (h5t.COMPLEX_IEEE_F32LE, "complex numbers"),
        (integer(3, 24), "integers of 24 bits"),
        (integer(16, 128), "integers of 128 bits"),
        (enumeration(integer(3, 24), a=0), "integers of 24 bits"),
        (custom_float(16, (127, 112, 15, 0, 112), 16383), "floating-point numbers of 128 bits with 15"),
        (custom_float(1, (7, 3, 4, 0, 3), 7), "floating-point numbers of 8 bits with 4 of exponent and 3"),
        (custom_float(1, (7, 2, 5, 0, 2), 15), "floating-point numbers of 8 bits with 5 of exponent and 2"),
    ],
)
def test_refused_with_its_name(tmp_path: Path, kind: Any, name: str) -> None:
    path = write(tmp_path / "a.h5", kind, b"", 3)
    with pytest.raises(
        DataError, match=rf"a\.h5: dataset `inputs` holds {name}.*Expected integers"
    ) as refused:
        read_info(path, plain(("inputs",)))
    assert "damaged" not in str(refused.value)
    with pytest.raises(DataError, match=rf"no dataset `x`; the file has `inputs` \[3\] {name}"):
        read_info(path, plain(("x",)))
