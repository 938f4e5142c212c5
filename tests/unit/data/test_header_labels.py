"""Labels that are read with the headers."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import header_labels as module
from hvd_train.data.catalog import join_shards, list_files, summarize_labels
from hvd_train.data.header_labels import header_labels
from hvd_train.data.headers import read_headers
from hvd_train.data.labels import Labels, join
from tests.unit.data.shards import opened_files, write_foreign


def by_ranks(data: DataConfig, size: int, *, tokens: bool = False) -> list[Labels]:
    """The labels of the training and of the validation shards, as `size` ranks find them together."""
    files, ranks = list_files(data), range(size)
    readers = [header_labels(data, tokens=tokens) for _ in ranks]
    read = [read_headers(files.every, files.places, rank, ranks, labels=readers[rank]) for rank in ranks]
    shards = join_shards(files, data, read)
    found = [summarize_labels(shards, rank, size, tokens=tokens, read=readers[rank]) for rank in ranks]
    return [join(part) for part in zip(*found, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("d", "v"):
        (tmp_path / part).mkdir()
        for i in range(5):
            write_foreign(tmp_path / part / f"{part}{i}.h5", 3 + i, 11 * i)
    write_foreign(tmp_path / "d" / "d9.h5", 0)
    return tmp_path


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_file_is_opened_once(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(path=str(folder / "d"), validation=str(folder / "v"))
    names = opened_files(monkeypatch)
    train, validation = by_ranks(data, size)
    assert sorted(names) == [*(f"d{i}.h5" for i in (0, 1, 2, 3, 4, 9)), *(f"v{i}.h5" for i in range(5))]
    values = [number % 7 for i in range(5) for number in range(11 * i, 11 * i + 3 + i)]
    for labels in (train, validation):
        assert labels.count == len(values) == 25
        assert labels.different == frozenset(values)
        assert labels.lowest is not None
        assert labels.highest is not None
        assert (labels.lowest.value, labels.highest.value) == (min(values), max(values)) == (0, 6)
    if size == 1:
        assert str(train.highest) == f"{folder}/d/d1.h5: `targets` holds 6 in row 2"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_large_fields_are_dealt_to_the_ranks(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(path=str(folder / "d"))
    small = by_ranks(data, size)
    monkeypatch.setattr(module, "MOST_BYTES", 5 * 8)
    names = opened_files(monkeypatch)
    assert [(part.count, part.different) for part in by_ranks(data, size)] == [
        (part.count, part.different) for part in small
    ]
    again = sorted(set(names))
    for name in again:
        names.remove(name)
    assert set(names) == {"d3.h5", "d4.h5"}, "those with 6 and 7 rows"


def test_tokens_are_inputs_and_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["inputs"], file["targets"] = np.arange(10 * i, 10 * i + 10), np.full(10, -100)
    names = opened_files(monkeypatch)
    labels, _ = by_ranks(DataConfig(path=str(tmp_path)), 2, tokens=True)
    assert names.count("1.h5") == 1
    assert len(names) == 3
    assert (labels.count, labels.different) == (30, frozenset(range(30)))
    both = DataConfig(path=str(tmp_path), inputs="targets")
    assert by_ranks(both, 2, tokens=True)[0].different == frozenset([-100])
    assert by_ranks(both, 2)[0].count == 0


def test_with_rows_that_may_be_left_out_they_are_read_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = opened_files(monkeypatch)
    labels, _ = by_ranks(DataConfig(path=str(folder / "d"), on_damage="skip"), 2)
    assert labels.count == 25
    assert names.count("d0.h5") == 2
