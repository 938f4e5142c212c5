"""A message about rows of any length says what they are and what to do, wherever they are met.

Relatives of a dataset of variable-length type that was said to hold `object`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import hvd_train
from hvd_train.data.sources.hdf5 import Hdf5Source
from hvd_train.data.sources.npz import load_npz, open_npy
from hvd_train.errors import DataError, UnsupportedShard
from tests.unit.data.chunked import all_rows, catalog_of
from tests.unit.data.recipes import written_again

RAW = np.arange(30, dtype="i2").reshape(10, 3)
LENGTHS = 1 + np.arange(10) % 3
AGAIN = (
    "Expected integers of 8 to 64 bits, floating-point numbers of 16 to 64 bits, or booleans. Write them as "
    "values and offsets, and name them `packed(values, offsets)`, with h5py, from an open file `old` to a "
    "new one, `new`: `rows = {}.reshape(-1); new['values'] = np.concatenate(rows); new['offsets'] = "
    "np.cumsum([0, *map(len, rows)])`. Copy the other datasets to the new file as well."
)


def rows_of_any_length(dtype: Any = "f4") -> Any:
    rows = np.empty(10, object)
    rows[:] = [RAW[row, :length].astype(dtype) for row, length in enumerate(LENGTHS)]
    return rows


def in_a_table(file: h5py.File) -> None:
    table = file.create_dataset("a", (10,), [("w", h5py.vlen_dtype("f4")), ("y", "f4")])
    table[...] = np.array([(row, 0) for row in rows_of_any_length()], table.dtype)


def along_the_last_axis(file: h5py.File) -> None:
    file.create_dataset("a", (1, 10), h5py.vlen_dtype("f4"))[0] = rows_of_any_length()


def as_values_of_packed_rows(file: h5py.File) -> None:
    file.create_dataset("a", (10,), h5py.vlen_dtype("f4"))[...] = rows_of_any_length()
    file["b"] = np.arange(11)


def in_a_virtual_dataset(file: h5py.File) -> None:
    file.create_dataset("b", (10,), h5py.vlen_dtype("f4"))[...] = rows_of_any_length()
    layout = h5py.VirtualLayout((10,), h5py.vlen_dtype("f4"))
    layout[:] = h5py.VirtualSource(".", "b", (10,))
    file.create_virtual_dataset("a", layout)


@pytest.mark.parametrize(
    ("make", "data", "what", "rows"),
    [
        (in_a_table, {"inputs": "a[w]"}, "dataset `a`, column `w`,", "old['a']['w']"),
        (along_the_last_axis, {"inputs": "a", "samples_axis": -1}, "dataset `a`", "old['a'][...]"),
        (as_values_of_packed_rows, {"inputs": "packed(a, b)"}, "dataset `a`", "old['a'][...]"),
        (in_a_virtual_dataset, {"inputs": "a", "follow_links": True}, "dataset `a`", "old['a'][...]"),
    ],
)
def test_rows_of_any_length_where_they_cannot_be_padded(
    make: Any, data: dict[str, Any], what: str, rows: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="v110") as file:
        make(file)
        file["targets"] = np.arange(10) % 3
    with pytest.raises(UnsupportedShard) as error:
        catalog_of(path, max_length=3, **data)
    message = str(error.value)
    assert message == f"{path}: {what} holds rows of variable length (float32). " + AGAIN.format(rows)
    found = all_rows(written_again(path, message, "targets"), inputs="packed(values, offsets)", max_length=3)
    marks = np.arange(3) < LENGTHS[:, np.newaxis]
    np.testing.assert_array_equal(found["packed(values, offsets)"], np.where(marks, RAW, 0))


def test_a_part_of_rows_of_variable_length_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (10,), h5py.vlen_dtype("f4"))[...] = rows_of_any_length()
        file["targets"] = np.arange(10) % 3
    with pytest.raises(UnsupportedShard) as error:
        catalog_of(path, inputs="a[0:2]", max_length=3)
    assert str(error.value) == (
        f"{path}: dataset `a` holds rows of variable length, and a part of each is named: `a[0:2]`. Expected "
        "the dataset alone: set data.max_length to the number of values that are read of each row, and "
        "data.truncate = true to cut longer ones."
    )
    found = all_rows(path, inputs="a", max_length=2, truncate=True)
    np.testing.assert_array_equal(found["a"], np.where(np.arange(2) < LENGTHS[:, None], RAW[:, :2], 0))


def refused(call: Any) -> str:
    with pytest.raises(DataError) as error:
        call()
    return str(error.value)


def test_shard_write_names_what_works_for_rows_of_any_length(tmp_path: Path) -> None:
    """It has no option to pad them."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (10,), h5py.vlen_dtype("f4"))[...] = rows_of_any_length()
        file["values"], file["offsets"] = np.concatenate(rows_of_any_length()), np.cumsum([0, *LENGTHS])
        file["targets"] = np.arange(10) % 3
    for place in ("a", "packed(values, offsets)"):
        assert refused(
            lambda place=place: Hdf5Source([str(path)], {"inputs": place, "targets": "targets"})
        ) == (
            f"{path}: `{place}` has rows of any length. Expected rows of one length: train on the file as it "
            "is, with data.max_length, or write the rows padded."
        )
        found = all_rows(path, inputs=place, max_length=3)
        np.testing.assert_array_equal(found[place], np.where(np.arange(3) < LENGTHS[:, None], RAW, 0))


@pytest.mark.parametrize("value", [rows_of_any_length(), [[1, 2], [3]], None])
def test_a_program_that_appends_rows_of_any_length(value: Any, tmp_path: Path) -> None:
    with hvd_train.ShardWriter(tmp_path / "out") as writer:
        writer.append({"inputs": np.zeros(3), "targets": 0})
        assert refused(lambda: writer.append({"inputs": value, "targets": 1})) == (
            "row 1: `inputs` has values of different lengths, or Python objects. Expected numbers: pad the "
            "values to one length, or convert them."
        )
        writer.append({"inputs": np.ones(3), "targets": 1})
    (shard,) = (tmp_path / "out").glob("*.h5")
    with h5py.File(shard) as file:
        assert file["targets"][:].tolist() == [0, 1]


def test_rows_of_any_length_in_files_of_numpy(tmp_path: Path) -> None:
    rows, numbers, both = tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "a.npz"
    np.save(rows, rows_of_any_length(), allow_pickle=True)
    np.save(numbers, np.arange(10))
    np.savez(both, inputs=rows_of_any_length(), targets=np.arange(10))
    said = (
        "it has Python objects, such as rows of different lengths, which are pickled: to load them could run "
        "any program. Pad the rows to one length. Expected a complete"
    )
    message = refused(lambda: open_npy({"inputs": str(rows), "targets": str(numbers)}))
    assert message == f"{rows}: {said} .npy file with plain numbers."
    assert refused(lambda: load_npz(both)) == f"{both}: {said} .npz file with plain numeric arrays."
