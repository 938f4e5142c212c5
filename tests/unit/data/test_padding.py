"""What is known of padded rows is known of their values alone."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.cli import main
from hvd_train.data.deal import Span
from hvd_train.data.exact_sums import sums_of
from hvd_train.data.format import FieldSpec, Padding
from hvd_train.data.grouping import Grouping
from hvd_train.data.labels import labels_of
from hvd_train.data.lengths import has_values, with_mask
from hvd_train.data.moments import mean_and_deviation, moments_of
from hvd_train.data.survey import survey
from hvd_train.data.values import values_of
from tests.unit.data.ragged import PACKED, catalog_of, padded, rows_of_lengths, write_packed, write_vlen

LENGTHS = [3, 0, 8, 1, 5, 0, 2, 7, 8, 4, 0]
ROWS = rows_of_lengths(LENGTHS)
FLAT = np.concatenate(ROWS)
FLOATS = [row.astype("f4") + 1e6 for row in ROWS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_packed(file, ROWS)
        write_vlen(file, "vlen", FLOATS)
        write_vlen(file, "labels", [row % 3 for row in ROWS])
        file["targets"] = np.arange(len(ROWS)) % 2
    return tmp_path / "a.h5"


def test_the_mask_of_a_field() -> None:
    field = FieldSpec(shape=(8, 2), dtype="float32", place=PACKED, padding=Padding(length=8))
    mask = FieldSpec(shape=(8,), dtype="bool", place=PACKED, padding=Padding(length=8, marks=True))
    assert with_mask("x", field) == {"x": field, "x_mask": mask}
    assert with_mask("x_mask", mask) == {"x_mask": mask}
    assert (has_values(field), has_values(mask)) == (True, False)


@pytest.mark.parametrize("whole", [True, False])
def test_a_survey(path: Path, whole: bool) -> None:
    catalog = catalog_of(path, inputs="vlen", fields={"tokens": PACKED})
    found = survey(catalog.train, catalog.sample.fields, num_bytes=None if whole else 1 << 20)
    assert list(found) == ["tokens", "vlen", "targets"]
    values = found["tokens"].values
    assert (values.rows, values.count, values.total) == (len(ROWS), len(FLAT), FLAT.sum())
    assert (values.lowest, values.highest) == (FLAT.min(), FLAT.max())
    assert (values.components, values.constant, values.one_hot) == (None, None, False)
    assert found["vlen"].values.lowest == FLAT.min() + 1e6


def test_values_of_a_block() -> None:
    block, marks = padded(ROWS, 8)
    found = values_of(block, 5, marks)
    assert found.count == len(FLAT)
    assert found.filled == int((FLAT == 5).sum())
    assert 0 not in (found.counts or {0})
    empty = values_of(block[5:6], None, marks[5:6])
    assert (empty.rows, empty.count, empty.lowest) == (1, 0, None)
    deep = np.repeat(block[..., np.newaxis], 3, axis=2)
    assert values_of(deep, None, marks).total == 3 * int(FLAT.sum())


def test_labels_of_a_block() -> None:
    rows = [np.array([4]), np.array([], int), np.array([7, -100, 2])]
    block, marks = padded(rows, 8)
    found = labels_of(block, "x", "a.h5", 10, marks=marks)
    assert (found.count, found.different) == (3, frozenset((2, 4, 7)))
    assert str(found.lowest) == "a.h5: `x` holds 2 in row 12"
    assert str(found.highest) == "a.h5: `x` holds 7 in row 12"
    assert labels_of(block, "x", "a.h5", ignore=False, marks=marks).count == 4
    assert labels_of(block[1:2], "x", "a.h5", marks=marks[1:2]).count == 0


def test_classes_and_scale_of_a_data_set(path: Path) -> None:
    catalog = catalog_of(path, fields={"tokens": PACKED}, inputs="tokens", targets="labels", scale="auto")
    labels = FLAT % 3
    assert (catalog.labels.count, catalog.sample.num_classes) == (len(labels), 3)
    assert catalog.sample.scale == 1 / FLAT.max()


@pytest.mark.parametrize("grouping", ["all", "component"])
def test_mean_and_deviation(path: Path, grouping: Grouping) -> None:
    field = catalog_of(path, inputs="vlen").sample.fields["vlen"]
    found = moments_of((Span(str(path), 0, len(ROWS)),), "vlen", field, grouping)
    sums = [sums_of(exact.table(*exact.places), exact.places[0]) for exact in (found.total, found.squares)]
    mean, deviation = mean_and_deviation(found.counts, found.lowest, found.highest, *sums)
    block, marks = padded(FLOATS, 8)
    values = np.ma.array(block.astype("f8"), mask=~marks)
    axis = None if grouping == "all" else 0
    np.testing.assert_array_equal(found.counts, np.atleast_1d(marks.sum(axis=axis)))
    np.testing.assert_allclose(mean, np.atleast_1d(values.mean(axis=axis)))
    expected = np.atleast_1d(values.std(axis=axis))
    np.testing.assert_allclose(deviation, np.where(found.counts > 1, expected, 1), rtol=1e-6)


def test_shard_info(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(path), "--inputs", PACKED, "--targets", "targets"]
    assert main(["shard", "info", *options]) == 2
    assert "set data.max_length = 8 or more (for `shard info` and `shard check`, --max-length 8)" in (
        capsys.readouterr().err
    )
    assert main(["shard", "info", *options, "--max-length", "8"]) == 0
    out = capsys.readouterr().out
    assert "int32 [8], padded" in out
    assert f"{FLAT.min()} to {FLAT.max()}" in out
    assert main(["shard", "info", *options, "--max-length", "8", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["values"][PACKED]["count"] == len(FLAT)
    assert entry["fields"][PACKED]["padding"] == {"length": 8, "truncate": False, "marks": False}
    assert main(["shard", "check", *options, "--max-length", "8"]) == 0
    assert main(["shard", "check", *options, "--max-length", "3"]) == 1
    assert "has 8 values in row 2; expected at most 3" in capsys.readouterr().err
    assert main(["shard", "check", *options, "--max-length", "0"]) == 2
    assert "--max-length = 0: expected at least 1 value" in capsys.readouterr().err


def test_spans_of_a_file(path: Path) -> None:
    """Rows from the middle of a file on."""
    catalog = catalog_of(path, inputs="vlen")
    found = survey([Span(str(path), 2, 5)], {"vlen": catalog.sample.fields["vlen"]})["vlen"]
    assert (found.values.rows, found.values.count) == (3, 14)
