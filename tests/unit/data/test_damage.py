"""Shards that are not what was written: a training refuses them, and `shard check` finds the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import shard_file
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.deal import Span, deal
from hvd_train.data.facts import decode, digest, digest_of, encode
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import locate
from hvd_train.data.manifest import load_manifest, save_manifest
from hvd_train.data.places import plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.launching import ROOT

NAMES = ("inputs", "targets")
FIXTURES = ROOT / "tests" / "fixtures"
ROWS, WIDTH = 40, 6


def arrays_of(rows: int = ROWS, first: int = 0) -> Arrays:
    """Inputs uint8 [rows, 6], no two rows alike; targets int64 [rows]."""
    values = (np.arange(first * WIDTH, (first + rows) * WIDTH).reshape(rows, WIDTH) * 7) % 251
    return Arrays(values.astype(np.uint8), np.arange(first, first + rows) % 5, 1 / 255)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One shard of 40 rows with blocks of 4 rows, and its manifest."""
    monkeypatch.setattr(shard_file, "CHECKSUM_BYTES", 4 * (WIDTH + 8))
    write_part(tmp_path / "d", arrays_of())
    return tmp_path / "d"


def shard_of(folder: Path) -> Path:
    return folder / "train-00000-of-00001.h5"


def read_all(folder: Path, reading: str = "memory") -> dict[str, np.ndarray]:
    """Every row of the train part, through the reader that a training has; sorted by the first column."""
    data = DataConfig(path=str(folder), reading=reading)
    catalog: Catalog = open_catalog(data)
    reader = make_reader(deal(catalog.train, 1)[0], data, 0, catalog.sample.fields, 1 << 40)
    try:
        batch = reader.next_batch(10_000)
        assert batch is not None
        return batch
    finally:
        reader.close()


def problems(folder: Path) -> list[str]:
    source = locate(str(folder), "PATH")
    return [
        p for shard in (*source.train, *source.validation) for p in check_shard(shard, plain(NAMES)).problems
    ]


def flip(path: Path, name: str, row: int) -> None:
    """One bit of the first value of a row of a contiguous dataset."""
    with h5py.File(path, locking=False) as file:
        dataset = file[name]
        at = dataset.id.get_offset() + row * dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


@pytest.mark.parametrize("reading", ["memory", "mmap", "stream"])
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_refused_with_file_dataset_and_rows(folder: Path, name: str, reading: str) -> None:
    np.testing.assert_array_equal(np.sort(read_all(folder, reading)["targets"]), np.sort(arrays_of().targets))
    flip(shard_of(folder), name, 13)
    message = rf"train-00000-of-00001\.h5: dataset `{name}`, rows 12 to 15: not what was written"
    with pytest.raises(DataError, match=message):
        read_all(folder, reading)
    assert f"dataset `{name}`, rows 12 to 15: not what was written" in problems(folder)[0]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 40), (12, 16), (13, 14), (10, 14), (15, 39), (11, 17), (13, 40)]
)
def test_a_block_is_verified_even_where_a_part_of_it_is_read(folder: Path, start: int, stop: int) -> None:
    path = shard_of(folder)
    fields = open_catalog(DataConfig(path=str(folder))).sample.fields
    good = Rows([Span(str(path), start, stop)], fields)
    np.testing.assert_array_equal(good.read(0, len(good))["inputs"], arrays_of().inputs[start:stop])
    assert good.read(0, 0)["inputs"].shape == (0, WIDTH)
    good.close()  # HDF5 keeps what it has read of an open file
    flip(path, "inputs", 12)  # outside of some of these ranges, but within their first block or their last
    damaged = Rows([Span(str(path), start, stop)], fields)
    with pytest.raises(DataError, match="rows 12 to 15: not what was written"):
        damaged.read(0, len(damaged))
    damaged.verify = False
    rows = damaged.read(0, len(damaged))["inputs"]
    np.testing.assert_array_equal(rows[:, 1:], arrays_of().inputs[start:stop, 1:])


def test_rows_read_in_any_order_are_those_that_were_written(folder: Path) -> None:
    rows = Rows(
        [Span(str(shard_of(folder)), 3, 38)], open_catalog(DataConfig(path=str(folder))).sample.fields
    )
    random = np.random.default_rng(0)
    for _ in range(200):
        start, stop = np.sort(random.integers(0, 36, 2))
        batch = rows.read(int(start), int(stop))
        np.testing.assert_array_equal(batch["inputs"], arrays_of().inputs[3 + start : 3 + stop])
        np.testing.assert_array_equal(batch["targets"], arrays_of().targets[3 + start : 3 + stop])


def test_a_block_is_hashed_when_it_is_first_read(folder: Path) -> None:
    path = shard_of(folder)
    rows = Rows([Span(str(path), 0, ROWS)], open_catalog(DataConfig(path=str(folder))).sample.fields)
    rows.read(0, 20)
    rows.close()
    flip(path, "inputs", 13)
    flip(path, "inputs", 30)
    assert rows.read(12, 16)["inputs"].shape == (4, WIDTH), "verified before"
    with pytest.raises(DataError, match="rows 28 to 31: not what was written"):
        rows.read(20, 40)


def without(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del (file.attrs if name.startswith("hvd_train") else file)[name]

    change.__name__ = f"without_{name}"
    return change


def other_schema(file: h5py.File) -> None:
    file.attrs["hvd_train_schema"] = 1


def no_traces_but_the_group(file: h5py.File) -> None:
    for name in list(file.attrs):
        del file.attrs[name]


def other_scale(file: h5py.File) -> None:
    text = bytes(file.attrs["hvd_train_facts"])
    file.attrs["hvd_train_facts"] = np.bytes_(text.replace(b'"scale":0.0039', b'"scale":0.0639'))


def other_counts(file: h5py.File) -> None:
    file["_hvd_train/class_counts/targets"][0] += 1


def a_class_less(file: h5py.File) -> None:
    counts = file["_hvd_train/class_counts/targets"][:-1]
    del file["_hvd_train/class_counts/targets"]
    file["_hvd_train/class_counts/targets"] = counts


def swapped_blocks(file: h5py.File) -> None:
    """Two whole blocks change places, and so do their checksums."""
    for name in ("inputs", "targets"):
        rows, sums = file[name], file[f"_hvd_train/checksums/{name}"]
        rows[:8] = np.concatenate([rows[4:8], rows[:4]])
        sums[:2] = sums[:2][::-1]


def a_row_less(file: h5py.File) -> None:
    for name in ("inputs", "targets"):
        rows = file[name][:-1]
        del file[name]
        file[name] = rows


def other_shape(file: h5py.File) -> None:
    rows = file["inputs"][:].reshape(ROWS, 2, 3)
    del file["inputs"]
    file["inputs"] = rows


def other_dtype(file: h5py.File) -> None:
    rows = file["targets"][:].view("u8")
    del file["targets"]
    file["targets"] = rows


def a_checksum_less(file: h5py.File) -> None:
    sums = file["_hvd_train/checksums/inputs"][:-1]
    del file["_hvd_train/checksums/inputs"]
    file["_hvd_train/checksums/inputs"] = sums


CHANGES = [
    *(without(f"hvd_train_{name}") for name in ("schema", "facts", "facts_digest")),
    *(without(name) for name in ("_hvd_train", "_hvd_train/checksums", "_hvd_train/checksums/inputs")),
    *(without(name) for name in ("_hvd_train/class_counts", "targets")),
    *(other_schema, no_traces_but_the_group, other_scale, other_counts, a_class_less, swapped_blocks),
    *(a_row_less, other_shape, other_dtype, a_checksum_less),
]


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "alone"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_shard_that_lost_or_changed_a_fact_is_damaged_not_foreign(
    folder: Path, change: Callable[[h5py.File], None], with_manifest: bool
) -> None:
    if not with_manifest:
        (folder / "manifest.json").unlink()
    assert problems(folder) == []
    with h5py.File(shard_of(folder), "r+") as file:
        change(file)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.h5"):
        read_all(folder)
    assert any("train-00000-of-00001.h5" in problem for problem in problems(folder))


def test_a_shard_without_any_metadata_is_identified_by_its_manifest(folder: Path) -> None:
    with h5py.File(shard_of(folder), "r+") as file:
        no_traces_but_the_group(file)
        del file["_hvd_train"]
    with pytest.raises(DataError, match=r"(?s)scale 1\.0, but 0\.0039|class counts None"):
        read_all(folder)
    assert any("not the shard that" in problem for problem in problems(folder))


def test_another_shard_in_its_place_is_known_by_its_digest(folder: Path, tmp_path: Path) -> None:
    other = arrays_of()
    write_part(tmp_path / "other", Arrays(other.inputs[::-1].copy(), other.targets, other.scale))
    shutil.copy(shard_of(tmp_path / "other"), shard_of(folder))
    with pytest.raises(DataError, match=r"not the shard that .*manifest\.json lists"):
        read_all(folder)
    assert "their digests differ" in problems(folder)[0]


def test_a_shard_that_is_replaced_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    rows = Rows(
        [Span(str(shard_of(folder)), 0, ROWS)], open_catalog(DataConfig(path=str(folder))).sample.fields
    )
    rows.read(0, ROWS)
    rows.close()
    write_part(tmp_path / "other", arrays_of(first=9))
    shutil.copy(shard_of(tmp_path / "other"), shard_of(folder))
    with pytest.raises(DataError, match="the file was replaced after the run began"):
        rows.read(0, ROWS)


def test_rows_that_exceed_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "wide.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", (4, 2**46), "f4", chunks=(1, 1024))
        file["targets"] = np.arange(4)
        file["inputs"][0, :1024] = 1
    with path.open("r+b") as raw:
        raw.truncate(1 << 34)  # sparse: large enough that so many values are believed
    with pytest.raises(DataError, match=r"wide\.h5: 4 rows need 1125899906842656 bytes of memory.*'stream'"):
        read_all(path)


def test_facts_are_read_as_they_were_written(folder: Path) -> None:
    with h5py.File(shard_of(folder)) as file:
        text, written = (bytes(file.attrs[f"hvd_train_{name}"]) for name in ("facts", "facts_digest"))
        sums = file["_hvd_train/checksums/inputs"][:]
    facts = decode(text, written)
    assert encode(facts) == text
    assert (facts.datasets["inputs"].shape, facts.datasets["inputs"].scale) == ((ROWS, WIDTH), 1 / 255)
    assert facts.datasets["inputs"].checksums == digest_of(sums)
    for wrong in (b"{}", text.replace(b'"checksum_rows":4', b'"checksum_rows":0')):
        with pytest.raises(ValueError, match=r"the metadata in the file|blocks of 0 rows"):
            decode(wrong, digest(wrong).encode())


def test_a_dataset_that_was_added_to_a_shard_is_read_as_a_foreign_one(folder: Path) -> None:
    with h5py.File(shard_of(folder), "r+") as file:
        file["weights"] = np.arange(ROWS) / 2
    catalog = open_catalog(DataConfig(path=str(folder), targets="weights"))
    rows = Rows(catalog.train, catalog.sample.fields)
    np.testing.assert_array_equal(rows.read(0, ROWS)["weights"], np.arange(ROWS) / 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"validation"', '"walidation"'),
        ('"scale": 0.00', '"scale": 0.01'),
        ('"num_classes": 5', '"num_classes": 6'),
        ('"digest"', '"DIGEST"'),
        ('"schema": 2', '"schema": 1'),
    ],
)
def test_a_manifest_that_was_changed_is_refused(folder: Path, old: str, new: str) -> None:
    write_part(folder, arrays_of(8, first=50), part="validation")
    path = folder / "manifest.json"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=r"manifest\.json: not what was written: it was damaged or changed"):
        load_manifest(folder)


def test_a_scale_that_is_not_the_manifests_is_refused(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest is not None
    save_manifest(folder, replace(manifest, sample=replace(manifest.sample, scale=0.5)))
    with pytest.raises(DataError, match=r"scale 0\.0039\d+, but 0\.5 in .*manifest\.json"):
        read_all(folder)
    assert "but 0.5 in" in problems(folder)[0]


@pytest.mark.parametrize(("schema", "block"), [(1, "rows 6 to 11"), (2, "rows 8 to 9")])
def test_shards_of_each_schema_are_read_and_checked(tmp_path: Path, schema: int, block: str) -> None:
    old = FIXTURES / f"shards-schema-{schema}"
    assert json.loads((old / "manifest.json").read_text())["schema"] == schema
    data = DataConfig(path=str(old))
    catalog = open_catalog(data)
    assert (catalog.sample.scale, catalog.sample.num_classes) == (1 / 255, 5)
    everything = Rows((*catalog.train, *catalog.validation), catalog.sample.fields).read(0, ROWS)
    np.testing.assert_array_equal(everything["inputs"], arrays_of().inputs)
    np.testing.assert_array_equal(everything["targets"], arrays_of().targets)
    assert problems(old) == []
    shutil.copytree(old, tmp_path / "d")
    flip(tmp_path / "d" / "train-00001-of-00002.h5", "inputs", 8)
    with pytest.raises(DataError, match=rf"train-00001-of-00002\.h5: dataset `inputs`, {block}: not what"):
        read_all(tmp_path / "d", "stream")
    assert f"{block}: not what was written" in problems(tmp_path / "d")[0]


def test_a_part_is_added_beside_shards_of_schema_1(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "shards-schema-1", tmp_path / "d")
    write_part(tmp_path / "d", arrays_of(10, first=30), part="validation", force=True)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["schema"] == 2
    assert [entry["facts_digest"] is None for entry in manifest["train"] + manifest["validation"]] == [
        True,
        True,
        False,
    ]
    assert problems(tmp_path / "d") == []
    assert sum(span.num_rows for span in open_catalog(DataConfig(path=str(tmp_path / "d"))).train) == 30


def test_the_stream_reader_reads_whole_checksummed_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = []
    read = ShardFile.read

    def recording(shard: ShardFile, name: str, start: int, stop: int) -> np.ndarray:
        edges.append((start, stop))
        return read(shard, name, start, stop)

    monkeypatch.setattr(ShardFile, "read", recording)
    fields = open_catalog(DataConfig(path=str(folder))).sample.fields
    for span, expected in (((0, ROWS), set()), ((6, 30), {(4, 8), (28, 32)})):
        rows = Rows([Span(str(shard_of(folder)), *span)], fields)
        reader = StreamReader(rows, 0, block_bytes=10 * (WIDTH + 8), window_blocks=2)
        for epoch in (0, 1):
            reader.start_epoch(epoch)
            while reader.next_batch(7) is not None:
                pass
        reader.close()
        assert set(edges) == expected, "what is read to verify it, beside the rows that are asked for"
        edges.clear()
