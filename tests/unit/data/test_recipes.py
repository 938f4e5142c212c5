"""What the refusal of a dataset says to do about it leads to a file with the values."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5t

from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.places import plain
from tests.launching import run
from tests.unit.data.recipes import refusal, written_again
from tests.unit.data.test_hdf5_types import custom_float, enumeration, integer, write

NAMES = ("inputs", "targets")
REAL_AND_IMAGINARY = np.array([1 + 2j, 3 - 4j, 0], "c8")
QUAD = custom_float(16, (127, 112, 15, 0, 112), 16383)
"""The long double of other machines than x86: 1.0 is an exponent of 16383 before 112 zero bits."""


def check(path: Path, seen: str, values: Any, dtype: str) -> None:
    """Refused as `seen` in one sentence; written again as the message says, it has `values` of `dtype`."""
    message = refusal(path, ("inputs",))
    assert message.startswith(f"{path}: dataset `inputs` holds {seen}. Expected integers of 8 to 64 bits, ")
    assert "damaged" not in message
    with ShardFile(written_again(path, message), plain(("inputs",))) as file:
        rows = file.read("inputs", 0, len(values))
        assert rows.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(rows, values)


@pytest.mark.parametrize(
    ("kind", "raw", "seen", "values", "dtype"),
    [
        (
            h5t.STD_B16LE,
            struct.pack("<3H", 1, 2**15, 7),
            "bit fields of 16 bits",
            [1, 2**15, 7],
            "uint16",
        ),
        (
            h5t.create(h5t.OPAQUE, 2),
            b"abcdef",
            "opaque values",
            [[97, 98], [99, 100], [101, 102]],
            "uint8",
        ),
        (
            h5t.py_create(np.dtype("c8")),
            REAL_AND_IMAGINARY.tobytes(),
            "complex numbers",
            [[1, 2], [3, -4], [0, 0]],
            "float32",
        ),
        (
            h5t.COMPLEX_IEEE_F32LE,
            REAL_AND_IMAGINARY.tobytes(),
            "complex numbers",
            [[1, 2], [3, -4], [0, 0]],
            "float32",
        ),
        (integer(3, 24), b"\1\0\0\0\1\0\0\0\1", "integers of 24 bits", [1, 256, 65536], "uint64"),
        (integer(16, 128), struct.pack("<6Q", 1, 0, 2, 0, 3, 0), "integers of 128 bits", [1, 2, 3], "uint64"),
        (
            enumeration(integer(3, 24), cat=0, dog=1),
            b"\1\0\0\0\0\0\1\0\0",
            "integers of 24 bits",
            [1, 0, 1],
            "uint64",
        ),
        (
            QUAD,
            b"".join(bytes(14) + struct.pack("<H", bits) for bits in (0x3FFF, 0xC000, 0)),
            "floating-point numbers of 128 bits with 15 of exponent and 112 of mantissa",
            [1, -2, 0],
            "float64",
        ),
        (
            custom_float(1, (7, 3, 4, 0, 3), 7),
            bytes([0x38, 0xC0, 0]),
            "floating-point numbers of 8 bits with 4 of exponent and 3 of mantissa",
            [1, -2, 0],
            "float64",
        ),
    ],
)
def test_values_that_numpy_or_a_batch_cannot_hold(
    tmp_path: Path, kind: Any, raw: bytes, seen: str, values: Any, dtype: str
) -> None:
    check(write(tmp_path / "a.h5", kind, raw, 3), seen, values, dtype)


def written(path: Path, build: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "w") as file:
        build(file)
    return path


def of_variable_length(file: h5py.File) -> None:
    dataset = file.create_dataset("inputs", (4,), h5py.vlen_dtype("f4"))
    for row in range(1, 4):
        dataset[row] = np.arange(1, row + 1)


def test_rows_of_variable_length_are_refused_before_a_training(tmp_path: Path) -> None:
    def build(file: h5py.File) -> None:
        of_variable_length(file)
        file["targets"] = np.arange(4) % 2

    path = written(tmp_path / "a.h5", build)
    command = [sys.executable, "-m", "hvd_train", "--data", str(path)]
    job = run(command, cwd=tmp_path, deadline_s=120)
    assert job.returncode == 2
    assert job.stderr == f"hvd_train: {refusal(path)}\n"


@pytest.mark.parametrize("length", [None, 5])
def test_names_of_classes(tmp_path: Path, length: int | None) -> None:
    def build(file: h5py.File) -> None:
        names = [name.encode() for name in ("dog", "cat", "dög")]
        file.create_dataset("inputs", data=names, dtype=h5py.string_dtype("utf-8", length))

    check(written(tmp_path / "a.h5", build), "strings", [1, 0, 2], "int64")


def test_references_to_datasets(tmp_path: Path) -> None:
    def build(file: h5py.File) -> None:
        for row in range(3):
            file[f"row{row}"] = np.arange(row, row + 2)
        file.create_dataset("inputs", data=[file[f"row{i}"].ref for i in range(3)], dtype=h5py.ref_dtype)

    check(written(tmp_path / "a.h5", build), "references", [[0, 1], [1, 2], [2, 3]], "int64")


def test_references_to_parts_of_a_dataset(tmp_path: Path) -> None:
    def build(file: h5py.File) -> None:
        rows = file.create_dataset("rows", data=np.arange(6.0))
        parts = [rows.regionref[row : row + 2] for row in (0, 2, 4)]
        file.create_dataset("inputs", (3,), h5py.regionref_dtype)[...] = parts

    check(written(tmp_path / "a.h5", build), "references", [[0, 1], [2, 3], [4, 5]], "float64")


@pytest.mark.parametrize(
    ("columns", "named", "values"),
    [
        ([("a", "f4"), ("b", "i8")], "inputs[a,b]", [[1, 2], [3, 4]]),
        ([("name", "S3"), ("it's", "u1"), ("b", "i2")], "inputs[it's,b]", [[2, 3], [4, 5]]),
        ([("a,b", "f4"), ("c", "i2")], "inputs[c]", [2, 4]),
    ],
)
def test_columns_of_numbers(
    tmp_path: Path, columns: list[tuple[str, str]], named: str, values: list[Any]
) -> None:
    def build(file: h5py.File) -> None:
        file["inputs"] = np.array(
            [tuple(range(1, len(columns) + 1)), tuple(range(3, len(columns) + 3))], columns
        )

    path = written(tmp_path / "a.h5", build)
    message = refusal(path, ("inputs",))
    assert f"holds compound values ({', '.join(f'`{name}`' for name, _ in columns)}). Expected" in message
    assert message.endswith(f"Name the columns to read, such as `{named}`.")
    with ShardFile(path, plain((named,))) as file:
        assert file.read(named, 0, 2).tolist() == values


def test_a_name_with_quotes(tmp_path: Path) -> None:
    """The statements have it as a literal of Python."""
    path = written(tmp_path / "a.h5", lambda file: file.create_dataset('it\'s "x"', data=np.zeros(3, "c8")))
    message = refusal(path, ('it\'s "x"',))
    with h5py.File(written_again(path, message)) as file:
        assert file['it\'s "x"'].shape == (3, 2)


@pytest.mark.parametrize(
    ("build", "seen"),
    [
        (lambda f: f.create_dataset("inputs", (3, 2), h5py.vlen_dtype("f4")), "rows of variable length"),
        (
            lambda f: f.create_dataset("inputs", (3,), h5py.vlen_dtype(h5py.string_dtype())),
            "rows of variable length",
        ),
        (lambda f: f.create_dataset("inputs", (3,), np.dtype([("s", "S2")])), "compound values"),
        (
            lambda f: f.create_dataset(
                "inputs", (3,), np.dtype([(f"{i:0200}", "i1") for i in range(99)] + [("s", "S2")])
            ),
            "compound values",
        ),
    ],
    ids=["rows of rows", "rows of strings", "no numbers", "many columns"],
)
def test_what_has_no_recipe_is_refused_all_the_same(
    tmp_path: Path, build: Callable[[h5py.File], None], seen: str
) -> None:
    message = refusal(written(tmp_path / "a.h5", build), ("inputs",))
    assert f"dataset `inputs` holds {seen}" in message
    assert message.endswith("or booleans. Write it again as numbers.")
    assert len(message) < 2500
