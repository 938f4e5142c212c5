"""Shards from a stream: bytes, memory, order, parts, and what a second call goes on with."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.data import shuffling
from hvd_train.data.check import check_shard
from hvd_train.data.format import FieldSpec
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import locate
from hvd_train.data.manifest import load_manifest
from hvd_train.data.places import plain
from hvd_train.data.sources import Arrays
from hvd_train.data.sources.base import Block, Source
from hvd_train.data.splitting import ByFraction, parse_split
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from hvd_train.tools.shard import main

ROWS = 1003


class Stream(Source):
    """Rows that are made when they are read: the number of the row in `inputs`, and modulo 7 in `targets`."""

    name = "the stream"
    num_rows: int | None = None

    def __init__(self, rows: int = ROWS, width: int = 4, block: int = 37, stop: int | None = None) -> None:
        self.rows, self.width, self.block, self.stop = rows, width, block, stop
        self.read: list[int] = []

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        inputs = FieldSpec(shape=(self.width,), dtype="float32")
        return {"inputs": inputs, "targets": FieldSpec(shape=(), dtype="int64")}

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        for first in range(start, self.rows, self.block):
            numbers = np.arange(first, min(self.rows, first + self.block))
            if self.stop is not None and not names and numbers[-1] >= self.stop:
                raise KeyboardInterrupt
            if not names:
                self.read += numbers.tolist()
            inputs = np.repeat(numbers[:, None].astype("f4"), self.width, axis=1)
            yield {"inputs": inputs, "targets": numbers % 7}


def numbers(folder: Path, part: str = "train") -> list[int]:
    """The numbers of the rows in a part, in their order."""
    rows: list[int] = []
    source = locate(str(folder), "PATH")
    for found in source.train if part == "train" else source.validation:
        with ShardFile(found.path, plain(("inputs", "targets"))) as shard:
            inputs = shard.read("inputs", 0, shard.info.num_samples)
            np.testing.assert_array_equal(shard.read("targets", 0, len(inputs)), inputs[:, 0] % 7)
            rows += inputs[:, 0].astype(int).tolist()
        assert check_shard(found, plain(("inputs", "targets"))).problems == ()
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_bytes_of_contiguous_shards_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """As version 0.1 wrote them, which had all rows in memory."""
    inputs = (np.arange(53 * 6).reshape(53, 2, 3) * 7 % 251).astype("u1")
    write_part(tmp_path, Arrays(inputs, np.arange(53) % 5, 1 / 255), shards=2)
    shards = {name: raw for name, raw in contents(tmp_path).items() if name.endswith(".h5")}
    assert {name: hashlib.sha256(raw).hexdigest()[:16] for name, raw in shards.items()} == {
        "train-00000-of-00002.h5": "58354e68f00197ee",
        "train-00001-of-00002.h5": "e5ebd7aecc249ee7",
    }


@pytest.mark.parametrize(
    "options", [{}, {"chunk_rows": 10}, {"compression": "gzip"}, {"shuffle_seed": 1}, {"by_class": True}]
)
@pytest.mark.parametrize("block", [1, 37, 2000])
def test_shards_do_not_depend_on_the_blocks_of_the_source(
    tmp_path: Path, options: dict[str, Any], block: int
) -> None:
    write_part(tmp_path / "a", Stream(block=block), shards=3, **options)
    write_part(tmp_path / "b", Stream(block=100), shards=3, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(numbers(tmp_path / "a")) == list(range(ROWS))
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == []


def test_the_order_of_a_shuffle_does_not_depend_on_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, memory in (("all", 1 << 20), ("some", 4000), ("rows", 100)):
        monkeypatch.setattr(shuffling, "MEMORY_BYTES", memory)
        write_part(tmp_path / name, Stream(), shards=3, shuffle_seed=5)
        write_part(tmp_path / f"{name}-by-class", Stream(), shards=3, by_class=True, shuffle_seed=5)
    for kind in ("", "-by-class"):
        order = numbers(tmp_path / f"all{kind}")
        assert sorted(order) == list(range(ROWS))
        assert order == numbers(tmp_path / f"some{kind}") == numbers(tmp_path / f"rows{kind}")
    write_part(tmp_path / "other", Stream(), shards=3, shuffle_seed=6)
    assert numbers(tmp_path / "other") != numbers(tmp_path / "all")


def test_rows_that_are_large_are_shuffled_one_by_one(tmp_path: Path) -> None:
    write_part(tmp_path, Stream(rows=9, width=300_000, block=2), shuffle_seed=5)
    assert numbers(tmp_path) == np.argsort(shuffling.random_keys(5, np.arange(9))).tolist()


def test_random_keys_are_those_of_splitmix64() -> None:
    (base,) = np.random.SeedSequence([7, 0]).generate_state(1, np.uint64)
    state = (int(base) + 3 * 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    assert int(shuffling.random_keys(7, np.array([2]))[0]) == z ^ (z >> 31)


@pytest.mark.parametrize("options", [{}, {"shuffle_seed": 1}, {"split": (("validation", 0.2),)}])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(shuffling, "MEMORY_BYTES", 2 << 20)
    num_bytes = 64 << 20
    source = Stream(rows=num_bytes // 4096, width=1024, block=64)
    tracemalloc.start()
    try:
        write_part(tmp_path, source, shards=2, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < num_bytes // 3


def test_a_second_call_goes_on_with_the_complete_shards(tmp_path: Path) -> None:
    write_part(tmp_path / "whole", Stream(), shards=5)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "ended", Stream(stop=600), shards=5)
    kept = tmp_path / "ended" / "train-00001-of-00005.h5"
    before = kept.stat().st_ino
    with pytest.raises(
        DataError, match=r"\.train\.unfinished\.json: `hvd_train shard write` was ended before"
    ):
        locate(str(tmp_path / "ended"), "PATH")
    source = Stream()
    write_part(tmp_path / "ended", source, shards=5)
    assert source.read == list(range(401, ROWS)), "the first two shards have 401 rows"
    assert kept.stat().st_ino == before
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")


def test_a_complete_shard_that_was_changed_is_written_anew(tmp_path: Path) -> None:
    write_part(tmp_path / "whole", Stream(), shards=5)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "ended", Stream(stop=600), shards=5)
    (tmp_path / "ended" / "train-00001-of-00005.h5").write_bytes(b"")
    source = Stream()
    write_part(tmp_path / "ended", source, shards=5)
    assert source.read[0] == 200
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "other", [{"shards": 4}, {"shards": 5, "chunk_rows": 10}, {"shards": 5, "scale": 0.5}]
)
def test_another_request_does_not_go_on(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, Stream(stop=600), shards=5)
    if other["shards"] == 5:
        with pytest.raises(DataError, match=r"train-00000-of-00005\.h5: exists\. Give --force"):
            write_part(tmp_path, Stream(), **other)
    source = Stream()
    write_part(tmp_path, source, **other, force=True)
    assert source.read == list(range(ROWS))


def test_fractions_of_all_rows(tmp_path: Path) -> None:
    split = tuple(parse_split("validation=0.1, test=0.25").items())
    write_part(tmp_path, Stream(), shards=2, split=split, shuffle_seed=3)
    train, validation, test = numbers(tmp_path), numbers(tmp_path, "validation"), numbers(tmp_path / "test")
    assert sorted(train + validation + test) == list(range(ROWS))
    assert (len(validation), len(test)) == (100, 251)
    assert validation == sorted(validation)
    assert train != sorted(train)
    write_part(tmp_path / "other", Stream(), split=split, split_seed=1)
    assert numbers(tmp_path / "other", "validation") != validation


@pytest.mark.parametrize("rows", [30, 50, ROWS, 20_000])
def test_stratified_parts_have_the_share_of_every_class(tmp_path: Path, rows: int) -> None:
    split = (("validation", 0.1), ("test", 0.2))
    write_part(tmp_path, Stream(rows=rows), split=split, stratify=True)
    for part, fraction in (("validation", 0.1), ("test", 0.2)):
        chosen = numbers(tmp_path, part) if part == "validation" else numbers(tmp_path / "test")
        found, there = (Counter(row % 7 for row in part) for part in (chosen, range(rows)))
        for label in range(7):
            assert abs(found[label] - fraction * there[label]) <= 1


def test_small_classes_give_a_part_its_share_of_all_rows() -> None:
    counts = dict.fromkeys(range(1000), 4)
    train, validation = ByFraction([0.1], counts, "targets", seed=0).sizes()
    assert train + validation == 4000
    assert abs(validation - 400) < 60  # 15.5 is the standard deviation


def test_no_group_is_in_two_parts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    patients = np.array([f"patient {i}" for i in rng.integers(0, 60, ROWS)])
    rows = np.repeat(np.arange(ROWS, dtype="f4")[:, None], 4, axis=1)
    np.savez(tmp_path / "a.npz", inputs=rows, targets=np.arange(ROWS) % 7, patient=patients)
    options = ["--split", "validation=0.2,test=0.1", "--group", "patient", "--out", str(tmp_path / "d")]
    assert main(["write", str(tmp_path / "a.npz"), *options]) == 0
    parts = [numbers(tmp_path / "d"), numbers(tmp_path / "d", "validation"), numbers(tmp_path / "d" / "test")]
    assert sorted(row for part in parts for row in part) == list(range(ROWS))
    groups = [set(patients[part]) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 60
    largest = max(Counter(patients.tolist()).values())
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(part) - fraction * ROWS) <= largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": (("validation", 0.1),), "by_class": True, "shards": 8},
            "--by-class --shards 8: the targets have 7 classes",
        ),
        ({"stratify": True}, "--stratify and --group say how --split divides the rows"),
        ({"split": (("validation", 0.1),), "part": "validation"}, "--part validation: is in --split as well"),
        ({"split": (("validation", 1e-4),)}, "--split: 1003 rows leave none for the part `validation`"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_part(tmp_path, Stream(), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("validation", r"'validation' is not a part and its fraction\. Expected such as `validation=0\.1`"),
        ("train=0.5", "'train=0.5' is not a part"),
        ("validation=0.5,test=0.5", "the fractions add up to 1 or more"),
    ],
)
def test_split_texts_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_split(text)


def test_a_part_without_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {"inputs": np.zeros((4, 2)), "targets": np.arange(4)}
    np.savez(tmp_path / "a.npz", **arrays, patient=np.zeros(4, int), dose=np.zeros(4))
    options = [str(tmp_path / "a.npz"), "--split", "validation=0.5", "--out", str(tmp_path / "d"), "--group"]
    assert main(["write", *options, "patient"]) == 2
    assert "--group patient: 1 group, none of them for the part `validation`" in capsys.readouterr().err
    assert main(["write", *options, "dose"]) == 2
    assert "a.npz: --group: the values are float64 [] a row. Expected one integer" in capsys.readouterr().err


@pytest.mark.parametrize("how", [{}, {"stratify": True}])
def test_classes_are_divided_within_the_part_that_gets_the_rest(tmp_path: Path, how: dict[str, Any]) -> None:
    split = (("validation", 0.2), ("test", 0.1))
    write_part(tmp_path / "d", Stream(), shards=3, by_class=True, split=split, shuffle_seed=2, **how)
    write_part(tmp_path / "e", Stream(), split=split, **how)
    manifest = load_manifest(tmp_path / "d")
    assert manifest is not None
    counts = [entry.class_counts or () for entry in manifest.train]
    classes = [[label for label, count in enumerate(shard) if count] for shard in counts]
    assert classes == [[0, 1, 2], [3, 4], [5, 6]]
    train = numbers(tmp_path / "d")
    assert sorted(train) == sorted(numbers(tmp_path / "e")), "the same rows as without --by-class"
    expected = Counter(row % 7 for row in train)
    assert {label: n for shard in counts for label, n in enumerate(shard) if n} == expected
    assert numbers(tmp_path / "d", "validation") == numbers(tmp_path / "e", "validation")
    assert numbers(tmp_path / "d" / "test") == numbers(tmp_path / "e" / "test")


def test_classes_are_divided_by_groups_as_well(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(ROWS, dtype="f4")[:, None], 4, axis=1)
    np.savez(tmp_path / "a.npz", inputs=rows, targets=np.arange(ROWS) % 7, patient=np.arange(ROWS) // 11)
    options = ["--split", "validation=0.2", "--group", "patient", "--by-class", "--shards", "7"]
    assert main(["write", str(tmp_path / "a.npz"), *options, "--out", str(tmp_path / "d")]) == 0
    train, validation = numbers(tmp_path / "d"), numbers(tmp_path / "d", "validation")
    assert sorted(train + validation) == list(range(ROWS))
    assert not {row // 11 for row in train} & {row // 11 for row in validation}
    assert train == sorted(train, key=lambda row: (row % 7, row))
