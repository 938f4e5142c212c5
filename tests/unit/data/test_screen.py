"""Rows that are left out of batches, since they hold values that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import MARK, Screen, is_finite, training_screen, usable
from hvd_train.errors import DataError

ROWS = 50


def fields_of(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, FieldSpec]:
    return {name: FieldSpec(shape=a.shape[1:], dtype=a.dtype.name) for name, a in arrays.items()}


def write(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> list[Span]:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return [Span(str(path), 0, len(array))]


def arrays_of(**more: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    inputs = np.arange(ROWS * 3, dtype="f4").reshape(ROWS, 3)
    return {"inputs": inputs, "targets": np.arange(ROWS, dtype="f8"), **more}


def marked(path: Path, arrays: dict[str, npt.NDArray[Any]], **sample: str) -> list[int]:
    """The rows that are left out."""
    fields = fields_of(arrays)
    spec = SampleSpec(inputs="inputs", targets="targets", fields=fields, **sample)
    rows = Rows(write(path, arrays), fields, screen=Screen(spec, not_finite="skip"))
    try:
        marks = rows.read(0, len(rows))[MARK]
        # However rows are read, a row has its mark.
        assert [int(rows.read(row, row + 1)[MARK][0]) for row in range(len(rows))] == marks.tolist()
    finally:
        rows.close()
    return list(map(int, np.flatnonzero(marks)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_values_that_are_not_finite(dtype: str, value: float) -> None:
    array = np.zeros((4, 5), dtype)
    assert is_finite(array)
    array[3, 4] = value
    assert not is_finite(array)


def test_float64_beyond_float32_is_not_finite_and_integers_are() -> None:
    assert is_finite(np.array([3.4e38, -3.4e38]))
    assert not is_finite(np.array([3.5e38]))
    assert is_finite(np.array([2**62]))
    assert is_finite(np.empty((0, 3), "f4"))


@pytest.mark.parametrize("name", ["inputs", "targets", "weight", "other"])
def test_any_field_of_a_row_counts(name: str, tmp_path: Path) -> None:
    arrays = arrays_of(weight=np.ones(ROWS, "f4"), other=np.ones((ROWS, 2, 2), "f2"))
    assert marked(tmp_path / "a.h5", arrays, weights="weight") == []
    for row in (0, 17, ROWS - 1):
        arrays[name].reshape(ROWS, -1)[row, -1] = np.nan
    assert marked(tmp_path / "b.h5", arrays, weights="weight") == [0, 17, ROWS - 1]


def test_targets_that_do_not_count_may_be_anything(tmp_path: Path) -> None:
    targets, mask = np.zeros((ROWS, 2)), np.ones((ROWS, 2), bool)
    weight = np.ones(ROWS, "f4")
    targets[[3, 4], 1] = np.nan
    mask[3, 1] = False
    targets[7] = np.nan
    weight[[7, 8]] = 0
    arrays = arrays_of(targets=targets, mask=mask, weight=weight)
    arrays["inputs"][8, 0] = np.nan  # enters the model, whatever the weight
    assert marked(tmp_path / "a.h5", arrays, mask="mask", weights="weight") == [4, 8]


@pytest.fixture(params=["memory", "stream"])
def reading(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reader_of(folder: Path, reading: str, not_finite: str) -> tuple[Reader, Screen | None]:
    data = DataConfig(path=str(folder), reading=reading, not_finite=not_finite)  # type: ignore[arg-type]
    catalog = open_catalog(data)
    screen = training_screen(data, catalog.sample)
    return make_reader(catalog.train, data, 0, catalog.sample.fields, 1 << 30, screen), screen


def read(reader: Reader) -> list[tuple[list[float], list[int], dict[str, int]]]:
    """Of each batch of an epoch the targets, which are used and what is left out."""
    found = []
    while (batch := reader.next_batch(8)) is not None:
        rows, kept, left_out = usable(batch)
        assert MARK not in rows
        assert len(rows["inputs"]) == len(rows["targets"]) == len(kept)
        found.append((rows["targets"].tolist(), kept.tolist(), left_out))
    reader.close()
    return found


def test_batches_keep_their_order_without_the_rows(reading: str, tmp_path: Path) -> None:
    arrays = arrays_of()
    bad = [2, 20, 21, 49]
    write(tmp_path / "a.h5", arrays)
    keep, none = reader_of(tmp_path, reading, "keep")
    assert none is None
    before = read(keep)
    arrays["inputs"][bad, 1] = np.nan
    write(tmp_path / "a.h5", arrays)
    reader, screen = reader_of(tmp_path, reading, "skip")
    assert reader.left == ROWS, "a row that is left out keeps its place"
    after = read(reader)
    assert [targets for targets, _, _ in after] == [[t for t in b if t not in bad] for b, _, _ in before]
    assert sum(left_out.get("not_finite", 0) for _, _, left_out in after) == 4
    assert all(
        (left_out == {}) == (len(kept) == len(b))
        for (_, kept, left_out), (b, _, _) in zip(after, before, strict=True)
    )
    assert screen is not None
    # A memory reader reads in the order of the file, and so does a stream within a window.
    assert screen.first_not_finite == f"{tmp_path / 'a.h5'}: `inputs` holds nan in row 2"


def test_an_error_names_file_dataset_and_row(reading: str, tmp_path: Path) -> None:
    arrays = arrays_of()
    arrays["targets"][33] = 1e39
    write(tmp_path / "b.h5", arrays)
    write(tmp_path / "a.h5", arrays_of())
    with pytest.raises(DataError) as error:
        read(reader_of(tmp_path, reading, "error")[0])
    assert str(error.value) == (
        f"{tmp_path / 'b.h5'}: `targets` holds 1e+39, too large for float32 in row 33; expected finite "
        "numbers. Replace the value, or leave such rows out: data.not_finite = 'skip'. `hvd_train shard "
        "check` counts such values in each file."
    )
    assert sum(len(targets) for targets, _, _ in read(reader_of(tmp_path, reading, "skip")[0])) == 99
    assert sum(len(targets) for targets, _, _ in read(reader_of(tmp_path, reading, "keep")[0])) == 100
