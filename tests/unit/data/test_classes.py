"""Targets that are not 0, 1, 2, ... become class numbers as the configuration says, or there is one error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.classes import Encoder
from hvd_train.data.format import Coding, FieldSpec, SampleSpec
from hvd_train.data.rows import Rows
from hvd_train.data.selection import select_rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import ConfigError, DataError

Array = npt.NDArray[Any]
UTF8 = h5py.string_dtype()
ANIMALS = ("cat", "dög", "bird")


def write(path: Path, targets: Any, dtype: Any = None, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("targets", data=targets, dtype=dtype)
        dataset.attrs.update(attributes)
        file["inputs"] = np.arange(2.0 * len(dataset), dtype="f4").reshape(-1, 2)
    return path


def catalog(path: Path, **data: Any) -> Catalog:
    return open_catalog(DataConfig(path=str(path), **data))


def numbers(path: Path, **data: Any) -> tuple[list[Any], int | None]:
    """The targets as they are read for training, and the number of classes."""
    found = catalog(path, **data)
    rows = Rows(found.train, found.sample.fields)
    read = rows.read(0, len(rows))["targets"]
    assert read.dtype == np.int64
    assert found.sample.fields["targets"].dtype == "int64"
    return read.tolist(), found.sample.num_classes


@pytest.mark.parametrize(
    ("targets", "classes", "expected"),
    [
        (np.array([-1, 1, 1, -1], "i1"), ("-1", "1"), [0, 1, 1, 0]),
        (np.array([3, 1, 2], ">i4"), ("3", "2", "1", "7"), [0, 2, 1]),
        (np.array([2**63, 5, 2**64 - 1], "u8")[1:2], ("5", "-1"), [0]),
        (np.array([-(2**63), 2**63 - 1]), (str(2**63 - 1), str(-(2**63))), [1, 0]),
        (np.array([True, False, True]), ("1", "0"), [0, 1, 0]),
        (np.array([0.0, 2.0, -100.0]), ("2", "0"), [1, 0, -100]),
        (np.array([4, 9, -100, 4], "f2"), ("4", "9"), [0, 1, -100, 0]),
        (np.array([[4, 9], [9, 9]]), ("4", "9"), [[0, 1], [1, 1]]),
        (np.array([-100, 5]), ("5", "-100"), [1, 0]),
        (np.array(["dög", "cat", "bird"], "O"), ANIMALS, [1, 0, 2]),
        (np.array([b"cat", b"do", b"cat"], "S3"), ("do", "cat"), [1, 0, 1]),
    ],
)
def test_values_become_the_numbers_of_listed_classes(
    tmp_path: Path, targets: Array, classes: tuple[str, ...], expected: list[Any]
) -> None:
    path = write(tmp_path / "a.h5", targets, UTF8 if targets.dtype == object else None)
    assert numbers(path, classes=classes) == (expected, len(classes))


def test_strings_of_a_fixed_length_in_utf_8_and_in_a_column_of_a_table(tmp_path: Path) -> None:
    names = [name.encode() for name in ("dög", "bird", "cat", "cat")]
    path = write(tmp_path / "a.h5", np.array(names, h5py.string_dtype("utf-8", 6)))
    assert numbers(path, classes=ANIMALS) == ([1, 2, 0, 0], 3)
    with h5py.File(path, "r+") as file:
        for column, dtype in (("fixed", h5py.string_dtype("utf-8", 6)), ("free", UTF8)):
            table = np.zeros(4, [("x", "f4"), ("label", dtype)])
            table["label"] = names
            file[column] = table
    for column in ("fixed", "free"):
        found = numbers(path, classes=ANIMALS, fields={"targets": f"{column}[label]"})
        assert found == ([1, 2, 0, 0], 3)


@pytest.mark.parametrize("dtype", ["u1", "f8", "bool"])
def test_one_hot_vectors(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "a.h5", np.eye(4, dtype=dtype)[[2, 0, 2, 1]])
    assert numbers(path, one_hot=True) == ([2, 0, 2, 1], 4)
    assert numbers(path, one_hot=True, classes=("a", "b", "c", "d")) == ([2, 0, 2, 1], 4)
    assert catalog(path, one_hot=True).sample.class_names == ()
    images = write(tmp_path / "b.h5", np.eye(3, dtype=dtype)[[[2, 0], [1, 1]]])
    assert numbers(images, one_hot=True) == ([[2, 0], [1, 1]], 3)


def test_a_value_that_marks_targets_without_a_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", np.array([0, 255, 2], "u1"))
    assert numbers(path, ignore_index=255) == ([0, -100, 2], 3)
    assert numbers(path, ignore_index=255, classes=("2", "0")) == ([1, -100, 0], 2)
    floats = write(tmp_path / "b.h5", np.array([0, -1, 2, -100], "f4"))
    assert numbers(floats, ignore_index=-1) == ([0, -100, 2, -100], 3)
    texts = write(tmp_path / "c.h5", np.array(["cat", "-1", "bird"], "O"), UTF8)
    assert numbers(texts, ignore_index=-1, classes=ANIMALS) == ([0, -100, 2], 3)


def test_a_fill_value_may_be_that_mark(tmp_path: Path) -> None:
    values = np.array([0, 255, 2], "u1")
    path = write(tmp_path / "a.nc", values, _FillValue=np.uint8(255), valid_range=np.array([0, 17], "u1"))
    with pytest.raises(
        DataError, match=r"if it marks targets without a class, set data\.ignore_index = 255;"
    ):
        catalog(path)
    assert numbers(path, ignore_index=255) == ([0, -100, 2], 3)
    floats = write(tmp_path / "b.nc", values.astype("f4"), _FillValue=np.float32(255))
    assert numbers(floats, ignore_index=255) == ([0, -100, 2], 3)
    with pytest.raises(
        DataError, match=r"`targets` holds nan in row 1; expected one of data\.classes: `0`, `2`"
    ):
        catalog(floats, classes=("0", "2"))


def test_class_counts_that_a_shard_records_are_of_other_values(tmp_path: Path) -> None:
    write_part(tmp_path / "d", Arrays(np.zeros((6, 2), "f4"), np.array([3, 5, 3, 3, 5, 5])))
    assert numbers(tmp_path / "d", classes=("5", "3")) == ([1, 0, 1, 1, 0, 0], 2)


@pytest.mark.parametrize(
    ("targets", "data", "message"),
    [
        (
            [-1, 0, 1],
            {"classes": ("-1", "1")},
            "holds 0 in row 1; expected one of data.classes: `-1`, `1`. Add it there, set data.ignore_index "
            "if it marks targets without a class, or leave out such rows.",
        ),
        ([[1, 1], [1, 7]], {"classes": ("1", "2")}, "holds 7 in row 1; expected one of data.classes: `1`"),
        ([1.0, 0.5], {"classes": ("0", "1")}, "holds 0.5 in row 1; expected one of data.classes: `0`, `1`."),
        ([1.0, np.nan], {"classes": ("0", "1")}, "holds nan in row 1; expected"),
        ([1.0, 2.0**63], {"classes": ("0", "1")}, f"holds {2.0**63} in row 1; expected"),
        (np.array([1, 2**64 - 1], "u8"), {"classes": ("-1", "1")}, f"holds {2**64 - 1} in row 1; expected"),
        (
            [1.0, 0.5],
            {"ignore_index": 255},
            "holds 0.5 in row 1; expected whole numbers of classes. Leave out such rows, or take task = "
            "'regression' without data.ignore_index.",
        ),
        (
            ["cat", "mouse"],
            {"classes": ("cat", "dog")},
            "holds `mouse` in row 1; expected one of data.classes: `cat`, `dog`. Add it there, set",
        ),
        (["cat", "mouse"], {"ignore_index": 1}, "holds strings; expected data.classes to list those that"),
        (
            [1, 2],
            {"classes": ("cat", "1")},
            "holds int64, but data.classes has `cat`; expected whole numbers, each once. List the values",
        ),
        ([1, 2], {"classes": ("1", "2", "01")}, "holds int64, but data.classes has `01`; expected whole"),
        ([1, 2], {"classes": ("1", str(2**63))}, f"holds int64, but data.classes has `{2**63}`; expected"),
        (
            [[0, 1, 0], [0, 1, 1]],
            {"one_hot": True},
            "holds [0, 1, 1] in row 1; expected one 1 among zeros, as data.one_hot says. Leave out such "
            "rows, or take task = 'regression' without data.one_hot.",
        ),
        ([[1.0, 0.0], [0.5, 0.5]], {"one_hot": True}, "holds [0.5, 0.5] in row 1; expected one 1 among"),
        ([[1.0, 0.0], [1.0, np.nan]], {"one_hot": True}, "holds [1.0, nan] in row 1; expected one 1 among"),
        (
            [0, 1],
            {"one_hot": True},
            "has the shape [] a sample; expected a number for each class along the last axis, as data.",
        ),
        (
            [[1, 0], [0, 1]],
            {"one_hot": True, "classes": ("a", "b", "c")},
            "has the shape [2] a sample and data.classes has 3 names; expected a number for each class",
        ),
    ],
)  # fmt: skip
def test_what_is_no_class_is_an_error(
    tmp_path: Path, targets: Any, data: dict[str, Any], message: str
) -> None:
    values = np.asarray(targets)
    is_text = values.dtype.kind == "U"
    path = write(tmp_path / "a.h5", values.astype(object) if is_text else values, UTF8 if is_text else None)
    with pytest.raises(DataError) as error:
        catalog(path, **data)
    assert str(error.value).startswith(f"{path}: dataset `targets` {message}")


def test_the_remedies_of_refused_labels_work(tmp_path: Path) -> None:
    signs = write(tmp_path / "a.h5", np.array([-1, 1, 1]))
    with pytest.raises(DataError, match=r"Set data\.classes = \['-1', '1'\], or write them as 0 and 1"):
        _ = catalog(signs).sample.num_classes
    assert numbers(signs, classes=("-1", "1")) == ([0, 1, 1], 2)
    marked = write(tmp_path / "b.h5", np.array([-1, 0, 1]))
    with pytest.raises(DataError, match=r"set data\.ignore_index = -1 if that marks targets without a class"):
        _ = catalog(marked).sample.num_classes
    assert numbers(marked, ignore_index=-1) == ([-100, 0, 1], 2)
    strings = write(tmp_path / "c.h5", np.array(["cat", "dog"], "O"), UTF8)
    with pytest.raises(
        DataError, match=r"If they are classes, list them in data\.classes, or write the numbers"
    ):
        catalog(strings)
    assert numbers(strings, classes=("cat", "dog")) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"classes": ("cat",)}, "data.classes = ('cat',): expected two classes or more."),
        ({"classes": ("a", "b", "a")}, "data.classes = ('a', 'b', 'a'): expected each value once."),
        (
            {"classes": ("1", "2"), "ignore_index": 2},
            "data.ignore_index = 2: expected a value that is not in data.classes.",
        ),
        ({"one_hot": True, "ignore_index": 2}, "data.ignore_index = 2: expected none with data.one_hot."),
        (
            {"one_hot": True, "targets": "inputs"},
            "data.targets = 'inputs': expected another dataset than data.inputs, with data.classes, one_hot "
            "or ignore_index.",
        ),
    ],
)
def test_keys_that_do_not_go_together(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(**data)
    assert str(error.value) == message


def test_classes_are_kept_with_the_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", np.array(["cat", "bird"], "O"), UTF8)
    sample = catalog(path, classes=ANIMALS, ignore_index=-1).sample
    assert sample.class_names == ANIMALS
    assert sample.fields["targets"].coding == Coding(names=ANIMALS, ignored=-1)
    plain = msgspec.json.decode(msgspec.json.encode(sample.to_json()))
    assert SampleSpec.from_json(plain) == sample
    assert msgspec.convert(plain, SampleSpec) == sample
    # Data that the model is used on later are read by the same list.
    later = write(tmp_path / "b.h5", np.array([b"bird", b"-1"], "S4"))
    selected = select_rows(str(later), sample, ("inputs", "targets"))
    assert Rows(selected.spans, selected.fields).read(0, 2)["targets"].tolist() == [2, -100]
    write(later, np.array([b"bird", b"cow"], "S4"))
    with pytest.raises(DataError, match="holds `cow` in row 1"):
        Rows(selected.spans, selected.fields).read(0, 2)


def test_a_sample_without_classes_is_saved_as_before() -> None:
    fields = {"x": FieldSpec(shape=(2,), dtype="float32"), "y": FieldSpec(shape=(), dtype="int64")}
    sample = SampleSpec(inputs="x", targets="y", fields=fields, num_classes=3)
    assert sample.to_json()["fields"] == {
        "x": {"shape": (2,), "dtype": "float32"},
        "y": {"shape": (), "dtype": "int64"},
    }
    assert sample.class_names == ()


@pytest.mark.parametrize("count", [2, 3, 1000])
def test_every_number_is_found_in_any_order(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.choice(10 * count, count, replace=False) - 5 * count
    encoder = Encoder(Coding(names=tuple(map(str, values))), np.dtype("i8"), (), "x")
    order: Sequence[int] = rng.permutation(count).tolist()
    assert encoder.encode(values[order], 0).tolist() == order
