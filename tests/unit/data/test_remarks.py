"""What looks wrong in the values of small HDF5 files, in one sentence each; and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import remarks
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.deal import Span, deal
from hvd_train.data.format import FieldSpec
from hvd_train.data.labels import Labels, labels_of, labels_of_counts
from hvd_train.data.sources import Arrays
from hvd_train.data.survey import Survey, survey
from hvd_train.data.values import values_of
from hvd_train.data.writer import write_part
from hvd_train.tools.shard import main

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(100, 4))


def surveyed(values: Any, tmp_path: Path) -> Survey:
    """Of a dataset `x` in a file `a.h5`, all rows read."""
    array = np.asarray(values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = array
    fields = {"x": FieldSpec(shape=array.shape[1:], dtype=array.dtype.name)}
    return survey([Span(str(tmp_path / "a.h5"), 0, len(array))], fields)["x"]


def on_inputs(
    values: Any, tmp_path: Path, integers: remarks.Integers = "unknown", **options: Any
) -> list[str]:
    lines = remarks.of_inputs(surveyed(values, tmp_path), integers, **options)
    return [line.replace(f"{tmp_path}/", "") for line in lines]


def changed(row: int, column: int, value: float) -> npt.NDArray[np.float64]:
    values = NORMAL.copy()
    values[row, column] = value
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            changed(5, 1, np.nan),
            "a.h5: `x` holds 1 NaN among 400 values, a share of 0.0025; expected finite numbers: the steps "
            "of a rank that draws others are lost. Replace them, or leave out their rows by data.not_finite "
            "= 'skip'; `hvd_train shard check` counts them in each file.",
        ),
        (changed(5, 1, -np.inf), "a.h5: `x` holds 1 inf among 400 values, a share of 0.0025; "),
        (
            np.full((20, 3), 2.5),
            "a.h5: every row of `x` has the value 2.5; nothing can be learned from it. Name another dataset, "
            "or write the values anew.",
        ),
        (np.tile([1.0, 2.0], (20, 1)), "a.h5: every row of `x` has the same values; nothing can be learned"),
        (np.ones((3, 5000)), "a.h5: every row of `x` has the value 1.0; nothing can be learned"),
        (np.ones((20, 3), bool), "a.h5: every row of `x` has the value 1; nothing can be learned"),
        (
            NORMAL * [1, 0, 1, 0],
            "a.h5: 2 of the 4 components of `x` are the same in every row (positions: 1, 3). A model learns "
            "nothing from them: leave them out if this is not intended.",
        ),
        (
            NORMAL * 1e5,
            "; expected a mean near 0 and a deviation near 1, which no --data.scale gives. With a built-in "
            "model give --data.standardize component; else subtract the mean and divide by the deviation "
            "before the values are written, or in the `transform` of your own task.",
        ),
        (NORMAL + 300, "of mean 300 and deviation 1; expected a mean near 0 and a deviation near 1"),
    ],
)
def test_inputs_that_look_wrong(values: npt.NDArray[np.generic], sentence: str, tmp_path: Path) -> None:
    (line,) = on_inputs(values, tmp_path)
    assert line.startswith("a.h5: ")
    assert sentence in line


@pytest.mark.parametrize(
    "values",
    [
        NORMAL,
        np.zeros((0, 4)),
        np.zeros((1, 4)),
        np.zeros((9, 0)),
        NORMAL * 100,
        np.pad(NORMAL.reshape(100, 2, 2), ((0, 0), (1, 1), (1, 1))),  # images with a border
        NORMAL > 0,
        RNG.integers(0, 255, (100, 4), dtype="u1"),  # an own task knows what to do with them
        RNG.integers(0, 1 << 40, (100, 4)),
    ],
)
def test_inputs_that_do_not_look_wrong(values: npt.NDArray[np.generic], tmp_path: Path) -> None:
    assert on_inputs(values, tmp_path) == []


def test_what_a_task_does_with_its_inputs_decides_what_is_said(tmp_path: Path) -> None:
    assert on_inputs(NORMAL * 1e5, tmp_path, floats=False) == [], "its transform may scale them"
    tokens = np.tile([7, 5], (20, 1))
    assert on_inputs(tokens, tmp_path, "tokens") == []
    (far,) = on_inputs(30_000 + np.arange(400).reshape(100, 4) % 9, tmp_path, "scaled")
    assert "has values from 3e+04 to 3.001e+04, of mean 3e+04 and deviation 2.6; expected" in far
    assert on_inputs(RNG.integers(0, 60_000, (100, 4)), tmp_path, "scaled") == []


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([0, 1, 1], "uint8", ""),
        ([0, 1], "bool", ""),
        (
            [0, 255],
            "uint8",
            "a.h5: `x` is uint8 with values up to 255, and no scale is known: the model takes them as they "
            "are. Give --data.scale 0.00392 (1/255) or auto to bring them to about 1, or --data.scale 1 if "
            "this is intended.",
        ),
        ([0, 64000], "uint16", "--data.scale 1.53e-05 (1/65535)"),
        ([0, 16], "uint8", "--data.scale 0.0625 (1/16)"),
        ([3, -2000], "int16", "values up to 2000, and no scale is known: .* --data.scale 0.0005 (1/2000)"),
    ],
)
def test_integers_without_a_scale(values: list[int], dtype: str, words: str, tmp_path: Path) -> None:
    lines = on_inputs(np.array(values, dtype), tmp_path, "unscaled")
    assert len(lines) == bool(words)
    for part in words.split(".* ") if words else ():
        assert part in lines[0]


def test_the_remedies_for_inputs_work(tmp_path: Path) -> None:
    far = NORMAL * 1e5 + 1e7
    assert on_inputs((far - far.mean()) / far.std(), tmp_path) == []
    ill = changed(5, 1, np.nan)
    assert on_inputs(np.nan_to_num(ill), tmp_path) == []
    assert on_inputs(np.delete(ill, 5, axis=0), tmp_path) == []
    assert on_inputs((NORMAL * [1, 0, 1, 0])[:, [0, 2]], tmp_path) == []


def test_a_statement_about_some_rows_says_so(tmp_path: Path) -> None:
    (line,) = on_inputs(np.full((300_000, 1), 9.0), tmp_path)
    assert "every row of `x` has the value 9.0 in 131,072 of 300,000 rows, which were read; nothing" in line
    wide = np.zeros((20, 1 << 17))
    wide[9:] = 1
    assert on_inputs(wide, tmp_path) == [], "one row was read"


def targets(
    values: Any, tmp_path: Path, kind: remarks.Targets = "classes", num_classes: int = 0
) -> list[str]:
    found = surveyed(values, tmp_path)
    labels = Labels()
    if found.field.dtype[0] in "iub":
        labels = labels_of(np.asarray(values), "x", found.file)
    lines = remarks.of_targets(found, kind, labels, num_classes)
    return [line.replace(f"{tmp_path}/", "") for line in lines]


@pytest.mark.parametrize(
    ("values", "kind", "sentence"),
    [
        (
            [1, 2, 3, 2],
            "classes",
            "a.h5: the classes of `x` are 1 to 3; expected them from 0. The model has an output for class 0, "
            "which never occurs: subtract 1 before they are written.",
        ),
        (
            [0, 2, 5, -100],
            "classes",
            "a.h5: of the classes 0 to 5, `x` never holds 1, 3, 4. The model has an output for each of them. "
            "Unless they are in data to come, write the classes anew: numpy.unique(x, "
            "return_inverse=True)[1] numbers them without gaps.",
        ),
        ([0, 900], "classes", "never holds 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 887 more. The"),
        (
            [0, 999_999],
            "classes",
            "a.h5: `x` holds 999999 in row 1: 1,000,000 classes, each with an output of the model, for 2 "
            "values. Take task = 'regression' for a quantity, or write the classes anew: numpy.unique(",
        ),
        (
            [4, 4],
            "classes",
            "a.h5: every value of `x` is 4; expected two classes or more. Name another dataset in "
            "data.targets, or add data of the other classes.",
        ),
        ([True, True], "classes", "a.h5: every value of `x` is 1; expected two classes"),
        ([2.5, 2.5], "quantities", "a.h5: every row of `x` has the value 2.5; nothing"),
        ([1.0, np.nan], "quantities", "a.h5: `x` holds 1 NaN among 2 values"),
        (
            [0.0, 1.0, 1.0],
            "quantities",
            "a.h5: `x` holds only 0 and 1. If these are classes, set data.classes = ['0', '1'] and "
            "task = 'classification'.",
        ),
        ([True, False], "quantities", "a.h5: `x` holds only 0 and 1."),
        (
            np.eye(3),
            "quantities",
            "a.h5: `x` holds only one-hot vectors. If these are classes, set data.one_hot = true and "
            "task = 'classification'.",
        ),
    ],
)
def test_targets_that_look_wrong(values: Any, kind: remarks.Targets, sentence: str, tmp_path: Path) -> None:
    (line,) = targets(values, tmp_path, kind)
    assert sentence in line


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 2], "classes"),
        ([0, 1, -100], "classes"),
        ([True, False], "classes"),
        (np.arange(2000), "classes"),
        (np.repeat(np.arange(0, 2400, 2), 2), "classes"),  # too many different ones to tell
        ([[1, 3], [4, 6]], "tokens"),
        ([0.5, 1.0], "quantities"),
        ([0.0, 1.0], "unknown"),  # a task of its own may have a loss for them
        ([1, 2, 3], "unknown"),
    ],
)
def test_targets_that_do_not_look_wrong(values: Any, kind: remarks.Targets, tmp_path: Path) -> None:
    assert targets(values, tmp_path, kind) == []


def test_a_class_of_the_validation_data_alone_is_missing(tmp_path: Path) -> None:
    (line,) = targets([0, 1, 2], tmp_path, num_classes=5)
    assert "of the classes 0 to 4, `x` never holds 3, 4." in line


def test_the_remedies_for_classes_work() -> None:
    for values in ([1, 2, 3, 2], [0, 2, 5, 2], [-7, 900_000, 4]):
        anew = np.unique(values, return_inverse=True)[1]
        assert remarks.of_targets(_of_integers(anew), "classes", labels_of(anew, "x", "a.h5")) == []
    assert remarks.missing_classes(labels_of(np.array([1, 2, 3]) - 1, "x", "a.h5")) == ""


def test_the_remedies_for_targets_of_a_regression_work() -> None:
    """What it names is what a classification takes."""
    for values, stored in (
        (np.eye(3), np.eye(3).argmax(axis=1)),
        (np.array([0.0, 1, 1]), np.array([0.0, 1, 1]).astype("int64")),
    ):
        assert remarks.refusal_of(values, "x", "a.h5")
        assert remarks.refusal_of(stored, "x", "a.h5") == ""
        assert remarks.of_targets(_of_integers(stored), "classes", labels_of(stored, "x", "a.h5")) == []


def _of_integers(values: npt.NDArray[np.int64]) -> Survey:
    spec = FieldSpec(shape=(), dtype="int64")
    return Survey(name="x", field=spec, values=values_of(values), num_rows=len(values))


def by_class(folder: Path, targets: npt.NDArray[np.int64], shards: int, **options: Any) -> Catalog:
    inputs = np.arange(2.0 * len(targets)).reshape(-1, 2)
    write_part(folder, Arrays(inputs, targets), shards=shards, **options)
    return open_catalog(DataConfig(path=str(folder)))


def alone(catalog: Catalog, ranks: int) -> str:
    return remarks.alone(deal(catalog.train, ranks), catalog.shards)


def test_classes_that_one_rank_alone_has(tmp_path: Path) -> None:
    catalog = by_class(tmp_path / "own", np.arange(60) % 6, 3, by_class=True)
    assert alone(catalog, 3) == (
        "rank 0 alone has the classes 0 and 1; rank 1 alone has the classes 2 and 3; rank 2 alone has the "
        "classes 4 and 5. Between two averages the other ranks learn nothing of them: shuffle the rows "
        "before they are cut into shards, as `hvd_train shard write --shuffle` does, or lower sync.period."
    )
    assert alone(catalog, 1) == ""
    assert alone(catalog, 2).startswith(
        "rank 0 alone has the classes 0, 1, 4 and 5; rank 1 alone has the classes 2 and 3. "
    )
    assert alone(catalog, 6) == "", "two ranks share each file, and either may have its classes"
    assert alone(catalog, 4).startswith("rank 2 alone has the classes 2 and 3; rank 3 alone")
    many = by_class(tmp_path / "many", np.arange(90) % 45, 3, by_class=True)
    line = alone(many, 3)
    assert line.startswith(
        "rank 0 alone has the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 11; 45 such classes in"
    )
    one = by_class(tmp_path / "one", np.repeat([0, 1, 2], [8, 10, 1]), 2)
    assert alone(one, 2).startswith("rank 0 alone has the class 0; rank 1 alone has the class 2. ")


def test_shuffled_shards_have_every_class(tmp_path: Path) -> None:
    """The remedy, as a user types it."""
    np.savez(tmp_path / "a.npz", inputs=np.arange(400.0).reshape(200, 2), targets=np.arange(200) // 50)
    for options, said in (((), True), (("--shuffle",), False)):
        out = str(tmp_path / f"d{len(options)}")
        assert main(["write", str(tmp_path / "a.npz"), "--out", out, "--shards", "2", *options]) == 0
        assert bool(alone(open_catalog(DataConfig(path=out)), 2)) == said


def test_nothing_is_said_of_classes_that_are_not_recorded_or_may_be_held_out(tmp_path: Path) -> None:
    catalog = by_class(tmp_path / "own", np.repeat([0, 1], [30, 30]), 2)
    assert alone(catalog, 2)
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["inputs"] = NORMAL
            file["targets"] = np.full(100, int(name == "b.h5"))
    assert alone(open_catalog(DataConfig(path=str(tmp_path / "*.h5"))), 2) == ""
    by_class(tmp_path / "rare", np.repeat([0, 1, 2], [30, 27, 3]), 2)
    part = open_catalog(DataConfig(path=str(tmp_path / "rare"), validation=0.1))
    assert alone(part, 2).startswith("rank 0 alone has the class 0; rank 1 alone has the class 1. ")
    thousands = by_class(tmp_path / "thousands", np.arange(2002) // 2, 2)
    assert alone(thousands, 2) == "", "that each rank has its own of so many is no wonder"


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (np.array([0, 1, 1]), ""),
        (np.array([True, False]), ""),
        (np.array([0.5, 1.0, 2.0]), ""),  # quantities
        (np.array([0.0, np.nan]), ""),
        (np.array([-1.0, 1.0]), ""),
        (np.array([1000.0, 2000.0]), ""),  # whole, but no class numbers of 2 rows
        (np.zeros((4, 3)), ""),
        (np.eye(4, 3), ""),  # a row of zeros
        (np.arange(12).reshape(4, 3), ""),  # tokens
        (np.array([0.0, 1.0, 1.0]), "a.npz: `y` is of type float64; expected integers from 0 on"),
        (np.array([[0.0], [1.0], [1.0]]), "a.npz: `y` is of type float64"),
        (np.eye(3), r"a.npz: `y` has the shape [3] a sample; expected one integer a sample"),
        (np.eye(3, dtype=bool), r"a.npz: `y` has the shape [3] a sample"),
        (np.array([0, -1]), "a.npz: `y` holds -1 in row 1"),
    ],
)
def test_targets_that_a_classification_would_refuse(targets: npt.NDArray[np.generic], words: str) -> None:
    said = remarks.refusal_of(targets, "y", "a.npz")
    assert words in said
    assert bool(said) == bool(words)


def test_class_counts_say_which_classes_are_missing() -> None:
    labels = labels_of_counts((0, 5, 4), "y", "a.h5")
    assert remarks.missing_classes(labels).startswith(
        "a.h5: the classes of `y` are 1 to 2; expected them from 0."
    )
