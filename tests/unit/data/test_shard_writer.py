"""`ShardWriter`: samples of a program as shards."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hvd_train
from hvd_train.data.format import Manifest
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.deadlines import seconds
from tests.unit.data.test_shard_streaming import contents, numbers

ROWS = 53


def sample(row: int) -> dict[str, Any]:
    return {"inputs": np.full(3, row, "f4"), "targets": row % 7}


def test_samples_become_the_shards_that_write_part_makes(tmp_path: Path) -> None:
    with hvd_train.ShardWriter(tmp_path / "a", shards=3) as writer:
        for row in range(20):
            writer.append(sample(row))
        rows = np.arange(20, ROWS)
        writer.append_batch({"targets": rows % 7, "inputs": np.repeat(rows[:, None], 3, 1).astype("f4")})
    rows = np.arange(ROWS)
    write_part(tmp_path / "b", Arrays(np.repeat(rows[:, None], 3, 1).astype("f4"), rows % 7), shards=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_of_so_many_rows(tmp_path: Path) -> None:
    with hvd_train.ShardWriter(tmp_path, rows_per_shard=20) as writer:
        rows = np.arange(ROWS)
        writer.append_batch({"inputs": np.repeat(rows[:, None], 3, 1), "targets": rows % 7})
    assert numbers(tmp_path) == list(range(ROWS))
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"train-0000{i}-of-00003.h5" for i in range(3))]


def test_after_an_exception_nothing_is_left(tmp_path: Path) -> None:
    def write() -> None:
        with hvd_train.ShardWriter(tmp_path, rows_per_shard=5) as writer:
            for row in range(12):
                writer.append(sample(row))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_replaced_only_by_force(tmp_path: Path) -> None:
    for force in (False, True):
        with hvd_train.ShardWriter(tmp_path, shards=1 + force, force=force) as writer:
            for row in range(12):
                writer.append(sample(row))
        with pytest.raises(DataError, match=r"-of-0000\d\.h5: exists\. Give force=True"):
            hvd_train.ShardWriter(tmp_path)
    assert sorted(contents(tmp_path)) == ["manifest.json", *(f"train-0000{i}-of-00002.h5" for i in range(2))]
    with hvd_train.ShardWriter(tmp_path, part="validation") as writer:
        writer.append(sample(3))
    assert numbers(tmp_path, "validation") == [3]


def test_fields_are_converted_to_what_was_given(tmp_path: Path) -> None:
    fields = {"x": ("float32", (2,)), "y": ("uint8", ())}
    with hvd_train.ShardWriter(tmp_path, fields=fields, inputs="x", targets="y", class_names=("a", "b")) as w:
        w.append({"x": [0.5, 1.5], "y": 1})
    manifest = hvd_train.data.manifest.load_manifest(tmp_path)  # type: ignore[attr-defined]
    assert [field.dtype for field in manifest.sample.fields.values()] == ["float32", "uint8"]
    assert (manifest.sample.inputs, manifest.sample.targets, manifest.class_names) == ("x", "y", ("a", "b"))


@pytest.mark.parametrize(
    ("options", "last", "message"),
    [
        (
            {},
            {"inputs": np.zeros(4, "f4"), "targets": 0},
            r"row 1: `inputs` is float32 \[4\]\. Expected float32",
        ),
        (
            {},
            {"inputs": np.zeros(3, "f8"), "targets": 0},
            r"row 1: `inputs` is float64 \[3\]\. Expected float32",
        ),
        (
            {},
            {"inputs": np.zeros(3, "f4")},
            r"row 1: a sample has the fields `inputs`\. Expected `inputs`, `targ",
        ),
        ({"targets": "y"}, {}, r"row 0: there is no field `y` in `inputs`, `targets`"),
        (
            {"fields": {"inputs": ("float32", (3,)), "targets": ("uint8", ())}},
            {"inputs": np.zeros(3, "f4"), "targets": 300},
            r"row 1: `targets` is int64 \[\]\. Expected uint8 \[\], as `fields` says: convert",
        ),
        ({"shards": 0}, {}, r"shards = 0: expected at least 1"),
        ({"shards": 1, "rows_per_shard": 1}, {}, "expected one of them"),
        ({"rows_per_shard": 0}, {}, "rows_per_shard = 0: expected at least 1"),
    ],
)
def test_samples_that_cannot_be_written(
    tmp_path: Path, options: dict[str, Any], last: dict[str, Any], message: str
) -> None:
    def write() -> None:
        with hvd_train.ShardWriter(tmp_path, **options) as writer:
            writer.append(sample(0))
            writer.append(last)

    with pytest.raises(DataError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no samples\. Expected at least 1: append some"):
        hvd_train.ShardWriter(tmp_path).close()
    with pytest.raises(DataError, match=r"row 0: `inputs` is <U1\. Expected integers"):
        hvd_train.ShardWriter(tmp_path).append({"inputs": "a", "targets": 0})
    writer = hvd_train.ShardWriter(tmp_path)
    writer.append(sample(0))
    writer.close()
    with pytest.raises(DataError, match="the writer is closed"):
        writer.append(sample(1))


class Rank:
    """One of several ranks that are threads."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier

    def allgather(self, value: Any, /) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        gathered = list(self._table)
        self._barrier.wait()
        return gathered


def in_ranks(folder: Path, samples: list[list[dict[str, Any]]], **options: Any) -> list[Manifest | DataError]:
    """What `close` returns or raises on each rank."""
    size = len(samples)
    table: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=seconds(60))
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        writer = hvd_train.ShardWriter(folder, comm=Rank(rank, size, table, barrier), **options)
        try:
            for one in samples[rank]:
                writer.append(one)
            results[rank] = writer.close()
        except DataError as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("options", "files"), [({}, 2), ({"shards": 6}, 3), ({"rows_per_shard": 2}, 4)])
def test_ranks_write_shards_of_their_own(tmp_path: Path, options: dict[str, Any], files: int) -> None:
    samples = [[sample(i) for i in range(6)], [], [sample(6)]]
    results = in_ranks(tmp_path, samples, **options)
    assert results[0] == results[1] == results[2]
    assert isinstance(results[0], Manifest)
    assert len(results[0].train) == files
    assert numbers(tmp_path) == list(range(7))
    assert len(list(tmp_path.iterdir())) == files + 1


def test_ranks_with_unlike_samples(tmp_path: Path) -> None:
    other = {"inputs": np.zeros(3), "targets": 1}
    results = in_ranks(tmp_path, [[sample(0)], [other]])
    assert str(results[0]) == str(results[1])
    assert "samples of rank 1 are `inputs` float64 [3], `targets` int64 [], but `inputs` float32 [3]" in str(
        results[0]
    )
    assert list(tmp_path.iterdir()) == []
