"""Fields of a sample from any place in a file: columns, parts of rows, other axes, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.format import Array, FieldSpec, SampleSpec
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.locate import Found
from hvd_train.data.places import Place, parse_place, places_of, plain
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.unit.data.test_hdf5_types import custom_float, write

ROWS = 12
LABELS = np.arange(ROWS) % 3


def rows_of(catalog: Catalog) -> dict[str, Array]:
    rows = Rows(catalog.train, catalog.sample.fields)
    try:
        return rows.read(0, len(rows))
    finally:
        rows.close()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("inputs", Place("inputs")),
        ("entry/data", Place("entry/data")),
        ("table[x]", Place("table", columns=("x",))),
        ("table[x, y_2]", Place("table", columns=("x", "y_2"))),
        ("spectrum[100:900]", Place("spectrum", cut=(slice(100, 900),))),
        ("image[0,:,::2]", Place("image", cut=(0, slice(None, None), slice(None, None, 2)))),
        ("x[-3:]", Place("x", cut=(slice(-3, None),))),
        ("*/data", Place("*/data")),
    ],
)
def test_places_as_text(text: str, place: Place) -> None:
    assert parse_place(text, "data.fields.a") == place
    assert parse_place(str(place), "data.fields.a") == place


@pytest.mark.parametrize(
    "text", ["", "/", "[x]", "a[", "a[]", "a[x", "a]", "a[x,1:2]", "a[x,]", "a[::0]", "a[::-1]", "*/*/a"]
)
def test_a_text_that_is_no_place(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.fields\.a = '.*': expected a dataset \(`entry/data`\)"):
        parse_place(text, "data.fields.a")


def test_every_kind_of_place_in_one_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, pair = rng.normal(size=(ROWS, 3, 8, 8)), rng.integers(0, 9, (ROWS, 2), np.int16)
    table = np.zeros(ROWS, [("id", "S3"), ("x", ">f4"), ("n", "u1"), ("pair", "i2", 2)])
    table["x"], table["n"], table["pair"] = rng.normal(size=ROWS), np.arange(ROWS), pair
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["entry/data"] = image
        file["entry/table"] = table
        file["class"] = LABELS
        file["w"] = np.linspace(0, 1, ROWS)
    fields = {
        "image": "entry/data[0,2:6,::3]",
        "numbers": "entry/table[x,n]",
        "pair": "/entry/table[pair]",
        "n": "entry/table[n]",
        "label": "class",
    }
    data = DataConfig(
        path=str(tmp_path / "a.h5"), fields=fields, inputs="image", targets="label", weights="w"
    )
    catalog = open_catalog(data)
    sample = catalog.sample
    assert {name: str(field) for name, field in sample.fields.items()} == {
        "image": "float64 [4, 3]",
        "numbers": "float32 [2]",
        "pair": "int16 [2]",
        "n": "uint8 []",
        "label": "int64 []",
        "w": "float64 []",
    }
    assert (sample.inputs, sample.targets, sample.weights, sample.num_classes) == ("image", "label", "w", 3)
    assert SampleSpec.from_json(sample.to_json()) == sample
    batch = rows_of(catalog)
    np.testing.assert_array_equal(batch["image"], image[:, 0, 2:6, ::3])
    np.testing.assert_array_equal(batch["numbers"], np.stack([table["x"], table["n"]], axis=1))
    np.testing.assert_array_equal(batch["pair"], pair)
    np.testing.assert_array_equal(batch["n"], table["n"])
    np.testing.assert_array_equal(batch["label"], LABELS)


@pytest.mark.parametrize("chunks", [None, True])
def test_samples_along_the_last_axis(tmp_path: Path, chunks: bool | None) -> None:
    values = np.random.default_rng(1).normal(size=(4, 5, ROWS)).astype("f4")
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file.create_dataset("inputs", data=values, chunks=chunks).attrs["MATLAB_class"] = np.bytes_("single")
        file["targets"] = LABELS[np.newaxis]
    path = str(tmp_path / "a.mat")
    with pytest.raises(
        DataError, match=r"`inputs` has 4 rows, `targets` has 1 rows.*MATLAB.*set data\.samples_axis = -1"
    ):
        open_catalog(DataConfig(path=path))
    catalog = open_catalog(DataConfig(path=path, samples_axis=-1))
    assert catalog.sample.fields["inputs"] == FieldSpec(shape=(4, 5), dtype="float32", axis=-1)
    batch = rows_of(catalog)
    np.testing.assert_array_equal(batch["inputs"], np.moveaxis(values, -1, 0))
    np.testing.assert_array_equal(batch["targets"], LABELS[:, np.newaxis])
    part = Rows(catalog.train, {"inputs": catalog.sample.fields["inputs"]})
    np.testing.assert_array_equal(part.read(3, 7)["inputs"], np.moveaxis(values[..., 3:7], -1, 0))
    part.close()


def test_groups_are_shards_of_their_own(tmp_path: Path) -> None:
    values = {f"scan_{i}": np.full((3 + i, 2), i, "f4") for i in (2, 0, 1)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, rows in values.items():
            file[f"entry/{name}/data"] = rows
            file[f"entry/{name}/class"] = np.arange(len(rows))
        file["entry/notes/text"] = np.zeros(3)
        file["entry/version"] = 1
    fields = {"inputs": "entry/*/data", "targets": "entry/*/class"}
    catalog = open_catalog(DataConfig(path=str(tmp_path), fields=fields))
    names = [f"{tmp_path}/a.h5:scan_{i}" for i in range(3)]
    assert [info.path for info in catalog.shards] == names
    assert [span.num_rows for span in catalog.train] == [3, 4, 5]
    batch = rows_of(catalog)
    assert batch["inputs"][:, 0].tolist() == [0] * 3 + [1] * 4 + [2] * 5
    assert batch["targets"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["entry/scan_1/class"]
    with pytest.raises(DataError, match=r"a\.h5:scan_1: no dataset `entry/scan_1/class`"):
        open_catalog(DataConfig(path=str(tmp_path), fields=fields))
    with pytest.raises(DataError, match=r"a\.h5: no group with `other/\*/data`"):
        open_catalog(DataConfig(path=str(tmp_path), fields={"inputs": "other/*/data", "targets": "*/class"}))


def test_a_group_is_named_twice_by_two_names_of_its_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["g/inputs"], file["g/targets"] = np.zeros((3, 2)), np.arange(3)
    (tmp_path / "b.h5").symlink_to("a.h5")
    with pytest.raises(DataError, match=r"b\.h5:g: the same file as .*a\.h5:g, under another name"):
        open_catalog(DataConfig(path=str(tmp_path), inputs="*/inputs", targets="*/targets"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("table[x,z]", r"dataset `table` has the columns `x`, `s`; expected `x`, `z` in it"),
        (
            "table[s]",
            r"column `s`, holds strings\. .* If they are classes, list them in data\.classes; else name",
        ),
        ("table", r"dataset `table` holds compound values .*such as `table\[x\]`"),
        ("rows[x]", r"dataset `rows` is no table; expected `x`"),
        ("rows[5:]", r"nothing of a sample of shape \[4\] is in \[5:\]\. Expected indices below 4"),
        ("rows[4]", r"nothing of a sample of shape \[4\] is in \[4\]"),
        ("rows[1:2,0]", r"has 1 axes a sample, \[4\], but 2 are cut"),
        ("table[0:1]", r"has 0 axes a sample, \[\], but 1 are cut"),
    ],
)
def test_a_place_that_is_not_there(tmp_path: Path, inputs: str, message: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["table"] = np.zeros(ROWS, [("x", "f4"), ("s", "S2")])
        file["rows"] = np.zeros((ROWS, 4))
        file["targets"] = LABELS
    with pytest.raises(DataError, match=message):
        open_catalog(DataConfig(path=str(tmp_path), inputs=inputs))


def test_an_axis_that_a_dataset_does_not_have(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"], file["targets"] = np.zeros((ROWS, 4)), LABELS
    with pytest.raises(DataError, match=r"dataset `targets` has 1 axes, and data\.samples_axis is 1"):
        open_catalog(DataConfig(path=str(tmp_path), samples_axis=1))


def test_parts_of_rows_are_compared_with_the_checksums_of_all(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(size=(ROWS, ROWS)).astype("f4")
    write_part(tmp_path, Arrays(values, np.eye(ROWS, dtype="f4")), part="train", shards=1, chunk_rows=4)
    path = tmp_path / "train-00000-of-00001.h5"
    data = DataConfig(path=str(path), inputs="inputs[1:3]")
    np.testing.assert_array_equal(rows_of(open_catalog(data))["inputs[1:3]"], values[:, 1:3])
    assert check_shard(Found(str(path)), plain(("inputs[1:3]", "targets"))).problems == ()
    with pytest.raises(DataError, match=r"written by hvd_train, which has samples along the first axis"):
        open_catalog(DataConfig(path=str(path), samples_axis=-1))
    with h5py.File(path, "a") as file:
        file["inputs"][5, 0] += 1
    with pytest.raises(DataError, match=r"rows 4 to 7: not what was written"):
        rows_of(open_catalog(data))
    (problem,) = check_shard(Found(str(path)), plain(("inputs[1:3]", "targets"))).problems
    assert "rows 4 to 7: not what was written" in problem


def test_names_in_the_configuration() -> None:
    data = DataConfig(fields={"x": "a/b", "extra": "c"}, inputs="x", targets="t[0]", mask="m")
    layout = places_of(data)
    assert {name: str(place) for name, place in layout.places.items()} == {
        "x": "a/b",
        "extra": "c",
        "t[0]": "t[0]",
        "m": "m",
    }
    with pytest.raises(DataError, match=r"data\.targets = 't\[': expected"):
        places_of(DataConfig(targets="t["))


def test_the_header_of_arrays_as_values(tmp_path: Path) -> None:
    def build() -> Any:
        return np.arange(ROWS * 4, dtype="i4").reshape(ROWS, 2, 2)

    kind = h5py.h5t.array_create(h5py.h5t.STD_I32BE, (2, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((ROWS,))
        dataset = h5py.h5d.create(file.id, b"inputs", kind, space)
        dataset.write(
            h5py.h5s.ALL, h5py.h5s.ALL, build(), h5py.h5t.array_create(h5py.h5t.NATIVE_INT32, (2, 2))
        )
        file["targets"] = LABELS
    info = read_info(tmp_path / "a.h5", plain(("inputs", "targets")))
    assert info.fields["inputs"] == FieldSpec(shape=(2, 2), dtype="int32")
    batch = rows_of(open_catalog(DataConfig(path=str(tmp_path / "a.h5"))))
    np.testing.assert_array_equal(batch["inputs"], build())


def test_a_part_of_rows_of_a_type_that_numpy_does_not_have(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("f4").view("u4") & 0xFFFF0000
    kind = custom_float(2, (15, 7, 8, 0, 7), 127)
    path = write(tmp_path / "a.h5", kind, (values >> 16).astype("<u2").tobytes(), ROWS, 6)
    with ShardFile(path, plain(("inputs[2:4]",))) as file:
        assert file.info.fields["inputs[2:4]"].dtype == "float32"
        np.testing.assert_array_equal(file.read("inputs[2:4]", 3, 9), values.view("f4")[3:9, 2:4])


def test_columns_that_are_not_asked_for_are_not_checked(tmp_path: Path) -> None:
    """`shard check` reads all of a dataset only for its checksums."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["table"] = np.zeros(ROWS, [("x", "f4"), ("kind", "i1"), ("name", "S2")])
    report = check_shard(Found(str(tmp_path / "a.h5")), plain(("table[x]", "table[kind]")))
    assert (report.problems, report.unsupported) == ((), ())
    assert report.info is not None
    assert report.info.num_samples == ROWS
