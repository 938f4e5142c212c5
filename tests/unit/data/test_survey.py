"""Which rows are read for a summary of the values, and from which file they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.survey import SURVEY_BYTES, Survey, join_surveys, survey
from hvd_train.data.values import Values, values_of
from hvd_train.errors import DataError

X = FieldSpec(shape=(), dtype="float64")


def shard(path: Path, values: Any, **options: Any) -> Span:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, **options)
    return Span(str(path), 0, len(values))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The row ranges that are read from now on."""
    ranges: list[tuple[int, int]] = []
    whole = ShardFile.read_into

    def spy(file: ShardFile, name: str, rows: Sequence[tuple[int, int]], out: Any) -> None:
        ranges.extend(rows)
        whole(file, name, rows, out)

    monkeypatch.setattr(ShardFile, "read_into", spy)
    return ranges


def test_small_data_are_read_whole_and_large_data_at_16_places(
    tmp_path: Path, read: list[tuple[int, int]]
) -> None:
    limit = SURVEY_BYTES // 8
    values = np.arange(3.0 * limit)
    found = survey([shard(tmp_path / "a.h5", values[:limit])], {"x": X})["x"]
    assert (found.complete, found.values.rows, read) == (True, limit, [(0, limit)])
    assert found.values.figures() == values_of(values[:limit]).figures()
    read.clear()
    found = survey([shard(tmp_path / "a.h5", values)], {"x": X})["x"]
    assert (found.complete, found.values.rows, found.num_rows) == (False, limit, 3 * limit)
    assert read == [(3 * limit * i // 16, 3 * limit * i // 16 + limit // 16) for i in range(16)]
    assert found.values.highest == values[read[-1][1] - 1], "also of the end of sorted rows"
    read.clear()
    found = survey([shard(tmp_path / "a.h5", values)], {"x": X}, num_bytes=None)["x"]
    assert (found.complete, found.values.total, read[-1][1]) == (True, sum(range(3 * limit)), 3 * limit)


def test_a_row_or_a_chunk_of_many_bytes_is_read_at_few_places(
    tmp_path: Path, read: list[tuple[int, int]]
) -> None:
    wide = FieldSpec(shape=(SURVEY_BYTES // 4,), dtype="float64")
    survey([shard(tmp_path / "a.h5", np.zeros((9, SURVEY_BYTES // 4)))], {"x": wide})
    assert read == [(0, 1)]
    read.clear()
    rows = 1 << 20
    span = shard(tmp_path / "b.h5", np.zeros(3 * rows), chunks=(rows,), compression="gzip")
    survey([span], {"x": X})
    assert [start for start, _ in read] == [0, 3 * rows // 2], "8 MiB are decoded for each"
    read.clear()
    survey([span], {"x": X}, num_bytes=None)
    assert read == [(0, rows), (rows, 2 * rows), (2 * rows, 3 * rows)], "each chunk is decoded once"


def test_rows_of_several_files_and_the_files_of_what_stands_out(tmp_path: Path) -> None:
    spans = [
        shard(tmp_path / "a.h5", np.array([1.0, 2.0])),
        shard(tmp_path / "b.h5", np.array([np.nan, -9.0, 7.0])),
        shard(tmp_path / "c.h5", np.array([np.inf, 3.0])),
    ]
    found = survey([spans[0], Span(spans[1].shard, 0, 2), spans[2]], {"x": X})["x"]
    assert (found.values.rows, found.num_rows, found.values.total) == (6, 6, -3)
    assert [Path(file).name for file in (found.file, found.not_finite_in, found.largest_in)] == [
        "a.h5",
        "b.h5",
        "b.h5",
    ]
    parts = [survey(part, {"x": X}) for part in ((), spans[2:], spans[:1], ())]
    joined = join_surveys(parts)["x"]
    assert (joined.num_rows, joined.file, joined.largest_in) == (4, spans[2].shard, spans[2].shard)
    assert survey((), {"x": X})["x"] == Survey(name="x", field=X, values=Values())


def test_a_fill_value_is_that_of_its_dataset(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.array([-100.0, 2.0])
        file["y"] = np.array([-100, 2])
    fields = {"x": X, "y": FieldSpec(shape=(), dtype="int64")}
    found = survey([Span(str(path), 0, 2)], fields, fills={"y": -100})
    assert [found[name].values.filled for name in fields] == [0, 1]


def test_a_dataset_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    span = shard(tmp_path / "a.h5", np.zeros(100), chunks=(50,), compression="gzip")
    with h5py.File(span.shard) as file:
        offset = file["x"].id.get_chunk_info(0).byte_offset
    with open(span.shard, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\xff" * 8)
    with pytest.raises(DataError, match=r"a\.h5: dataset `x`, rows 0 to 99"):
        survey([span], {"x": X})


def test_of_many_files_some_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [shard(tmp_path / f"{i:03}.h5", np.full(10, float(i))) for i in range(200)]
    opened: list[str] = []
    init = ShardFile.__init__

    def counting(self: ShardFile, path: str, *args: object, **options: object) -> None:
        opened.append(path)
        init(self, path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardFile, "__init__", counting)
    found = survey(spans, {"x": X})["x"]
    assert len(set(opened)) < 100
    assert (found.values.rows, found.num_rows, found.complete) == (640, 2000, False)
    assert (found.values.lowest, found.file) == (0, spans[0].shard)
    assert found.values.highest is not None
    assert found.values.highest > 185
