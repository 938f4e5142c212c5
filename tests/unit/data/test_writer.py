"""Writing shards, checking them, and finding damage in them again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest

from hvd_train.data import manifest as manifest_module
from hvd_train.data import shard_file
from hvd_train.data.check import check_shard
from hvd_train.data.format import Manifest
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.hdf5.write import ShardStream
from hvd_train.data.locate import Source, locate
from hvd_train.data.manifest import load_manifest, save_manifest
from hvd_train.data.places import plain
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.unit.data.shards import inputs_of

NAMES = ("inputs", "targets")


def arrays_of(rows: int, num_classes: int = 10) -> Arrays:
    return Arrays(inputs_of(0, rows), np.arange(rows) % num_classes, 0.5)


def read_all(folder: Path, part: str = "train") -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    source = locate(str(folder), "PATH")
    pieces = []
    for found in source.train if part == "train" else source.validation:
        with ShardFile(found.path, plain(NAMES)) as shard:
            n = shard.info.num_samples
            pieces.append((shard.read("inputs", 0, n), shard.read("targets", 0, n)))
    return pieces


def problems(folder: Path) -> list[str]:
    source: Source = locate(str(folder), "PATH")
    found = (*source.train, *source.validation)
    return [problem for shard in found for problem in check_shard(shard, plain(NAMES)).problems]


@pytest.mark.parametrize(
    "options", [{}, {"chunk_rows": 7}, {"compression": "gzip"}, {"compression": "gzip", "chunk_rows": 7}]
)
@pytest.mark.parametrize("shards", [1, 3, 11])
def test_written_rows_are_read_back(tmp_path: Path, shards: int, options: dict[str, Any]) -> None:
    arrays = arrays_of(11)
    manifest = write_part(tmp_path, arrays, shards=shards, **options)
    pieces = read_all(tmp_path)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in pieces]), arrays.inputs)
    np.testing.assert_array_equal(np.concatenate([y for _, y in pieces]), arrays.targets)
    assert max(len(x) for x, _ in pieces) - min(len(x) for x, _ in pieces) <= 1
    assert [entry.num_samples for entry in manifest.train] == [len(x) for x, _ in pieces]
    assert manifest.train[0].file == f"train-00000-of-{shards:05d}.h5"
    assert problems(tmp_path) == []
    assert load_manifest(tmp_path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["manifest.json", *(entry.file for entry in manifest.train)]
    ), "nothing temporary is left"


def test_header_of_a_written_shard(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(50, num_classes=4), compression="gzip", chunk_rows=16)
    info = read_info(tmp_path / "train-00000-of-00001.h5", plain(NAMES))
    assert (info.num_samples, info.chunk_rows, info.compressed, info.checksum_rows) == (50, 16, True, 16)
    assert (info.class_counts, info.scale) == ((13, 13, 12, 12), 0.5)
    swapped = read_info(tmp_path / "train-00000-of-00001.h5", plain(("targets", "inputs")))
    assert (swapped.class_counts, swapped.scale) == (None, None), "they belong to targets and inputs"


def test_by_class_gives_each_shard_a_range_of_classes(tmp_path: Path) -> None:
    manifest = write_part(tmp_path, arrays_of(100), shards=2, by_class=True)
    first, second = (set(y.tolist()) for _, y in read_all(tmp_path))
    assert (first, second) == ({0, 1, 2, 3, 4}, {5, 6, 7, 8, 9})
    assert [entry.class_counts for entry in manifest.train] == [(10,) * 5, (0,) * 5 + (10,) * 5]
    assert manifest.sample.num_classes == 10


def test_by_class_goes_by_the_classes_that_occur(tmp_path: Path) -> None:
    arrays = Arrays(inputs_of(0, 6), np.array([10**9, 3, 3, 10**9, 500, 500]))
    write_part(tmp_path, arrays, shards=3, by_class=True)
    assert [set(y.tolist()) for _, y in read_all(tmp_path)] == [{3}, {500}, {10**9}]
    with pytest.raises(DataError, match=r"--by-class --shards 4: the targets have 3 classes"):
        write_part(tmp_path / "b", arrays, shards=4, by_class=True)
    with pytest.raises(DataError, match=r"--by-class: targets are float32 \[\]"):
        write_part(tmp_path / "c", Arrays(arrays.inputs, np.zeros(6, "f4")), by_class=True)


def test_shuffle_is_a_function_of_the_seed(tmp_path: Path) -> None:
    arrays = arrays_of(60)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_part(tmp_path / name, arrays, shards=2, shuffle_seed=seed)
    a, b, c = (np.concatenate([x[:, 0] for x, _ in read_all(tmp_path / name)]) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, arrays.inputs[:, 0])
    np.testing.assert_array_equal(np.sort(a), arrays.inputs[:, 0])
    one, two = (tmp_path / name / "train-00000-of-00002.h5" for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(20), shards=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for shards in (2, 3):
        with pytest.raises(DataError, match=r"train-00000-of-0000\d\.h5: exists\. Give --force"):
            write_part(tmp_path, arrays_of(30), shards=shards)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_part(tmp_path, arrays_of(30), shards=3, force=True)
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == [f"train-{i:05d}-of-00003.h5" for i in range(3)]
    assert sum(len(x) for x, _ in read_all(tmp_path)) == 30


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_part(tmp_path, arrays_of(20))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardStream, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        write_part(tmp_path, arrays_of(10), force=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_parts_are_added_to_one_manifest(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(20, num_classes=3), shards=2)
    manifest = write_part(tmp_path, arrays_of(10), part="validation")
    assert [len(manifest.train), len(manifest.validation), manifest.sample.num_classes] == [2, 1, 10]
    assert problems(tmp_path) == []
    wide = Arrays(inputs_of(0, 5, width=4), np.arange(5), 0.5)
    with pytest.raises(DataError, match=r"manifest\.json: the other part has fields .*\(3,\).*\(4,\)"):
        write_part(tmp_path, wide, part="validation", force=True)


@pytest.mark.parametrize(("shards", "options"), [(0, {}), (21, {}), (1, {"chunk_rows": 0})])
def test_impossible_numbers_are_refused(tmp_path: Path, shards: int, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"--(shards|chunk-rows) \d+: expected"):
        write_part(tmp_path, arrays_of(20), shards=shards, **options)


def overwrite(path: Path, name: str, row: int, raw: bytes) -> None:
    """Damages the bytes of one row of a contiguous dataset, or of the chunk that holds it."""
    with h5py.File(path) as file:
        dataset = file[name]
        if dataset.chunks:
            offset = dataset.id.get_chunk_info(row // dataset.chunks[0]).byte_offset
        else:
            offset = dataset.id.get_offset() + row * dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(raw)


def test_damaged_bytes_are_found_and_named_by_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "CHECKSUM_BYTES", (12 + 8) * 8)  # blocks of 8 rows
    write_part(tmp_path, arrays_of(50))
    path = tmp_path / "train-00000-of-00001.h5"
    overwrite(path, "inputs", 13, b"\x01")
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{path}: dataset `inputs`, rows 8 to 15: not what was written.")
    overwrite(path, "inputs", 23, b"\x01")
    overwrite(path, "inputs", 49, b"\x01")
    first, second = problems(tmp_path)
    assert first.startswith(f"{path}: dataset `inputs`, rows 8 to 23: not what was written.")
    assert second.startswith(f"{path}: dataset `inputs`, rows 48 to 49: not what was written.")


def test_damaged_targets_are_found_twice(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(50))
    path = tmp_path / "train-00000-of-00001.h5"
    overwrite(path, "targets", 0, b"\x09")
    rows, counts = problems(tmp_path)
    assert rows.startswith(f"{path}: dataset `targets`, rows 0 to 49: not what was written.")
    assert counts.startswith(f"{path}: class counts [4, 5, 5, 5, 5, 5, 5, 5, 5, 6], but [5, 5,")


def test_a_damaged_compressed_chunk_is_named_by_its_rows(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(50), compression="gzip", chunk_rows=10)
    path = tmp_path / "train-00000-of-00001.h5"
    overwrite(path, "inputs", 20, b"\xff" * 20)
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{path}: dataset `inputs`, rows 20 to 29: ")


def test_shards_that_do_not_fit_their_manifest_are_found(tmp_path: Path) -> None:
    write_part(tmp_path, arrays_of(40), shards=3)
    first, second, third = (tmp_path / f"train-{i:05d}-of-00003.h5" for i in range(3))
    first.write_bytes(second.read_bytes())
    third.unlink()
    values = json.loads((tmp_path / "manifest.json").read_text())
    values["sample"]["fields"]["inputs"]["shape"] = [4]
    write_manifest(tmp_path, values)
    found = problems(tmp_path)
    assert any(p.startswith(f"{first}: class counts") for p in found)
    assert any(p.startswith(f"{second}: `inputs` is ") for p in found)
    assert any(p.startswith(f"{third}: no such file") for p in found)
    write_part(tmp_path / "b", arrays_of(40), shards=2)
    write_part(tmp_path / "c", arrays_of(41), shards=1)
    (tmp_path / "b" / "train-00000-of-00002.h5").write_bytes(
        (tmp_path / "c" / "train-00000-of-00001.h5").read_bytes()
    )
    assert any("41 samples, but 20 in" in p for p in problems(tmp_path / "b"))


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """A manifest as one with other values would be written: with the digest of those."""
    manifest = msgspec.json.decode(json.dumps(values), type=Manifest)
    save_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema None: this program reads schema 1 or 2"),
        ('{"schema": 3, "sample": {}}', "schema 3: this program reads schema 1 or 2"),
        ('{"schema": [2]}', r"schema \[2\]: this program reads schema 1 or 2"),
        ('{"schema": 1}', "not a manifest: .*sample"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json: {message}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["/etc/shard.h5", "../shard.h5", "a/../../b.h5"])
def test_a_manifest_names_no_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    write_part(tmp_path, arrays_of(4))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("train-00000-of-00001.h5", name))
    with pytest.raises(DataError, match=r"is outside the manifest's folder"):
        load_manifest(tmp_path)


def test_later_versions_may_add_to_a_manifest(tmp_path: Path) -> None:
    manifest = write_part(tmp_path, arrays_of(4))
    path = tmp_path / "manifest.json"
    values = {**json.loads(path.read_text()), "licence": "CC0"}
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"manifest\.json: not what was written"):
        load_manifest(tmp_path)
    values["digest"] = manifest_module._digest(values)
    path.write_text(json.dumps(values))
    assert load_manifest(tmp_path) == replace(manifest, digest=values["digest"])
