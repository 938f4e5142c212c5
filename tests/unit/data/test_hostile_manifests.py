"""Manifests that lead elsewhere, or that are not what they should be: one error that names the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.manifest import _digest, load_manifest, save_manifest
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError

ROWS = 20
SHARD = "train-00000-of-00001.h5"
REWRITE = (
    "Remove it and write the shards anew with `hvd_train shard write`, or name the shards by a glob pattern."
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A shard and its manifest."""
    inputs = np.arange(ROWS * 3, dtype="f4").reshape(ROWS, 3)
    write_part(tmp_path / "d", Arrays(inputs, np.arange(ROWS) % 5))
    return tmp_path / "d"


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        open_catalog(DataConfig(path=str(folder)))
    return str(error.value)


def num_rows(path: Path | str) -> int:
    return sum(span.num_rows for span in open_catalog(DataConfig(path=str(path))).train)


def list_files(folder: Path, *names: str) -> None:
    """A manifest with these files, which fits its digest."""
    manifest = load_manifest(folder)
    assert manifest is not None
    save_manifest(folder, replace(manifest, train=tuple(replace(manifest.train[0], file=n) for n in names)))


def change(folder: Path, values_of: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest with other values, which fits its digest."""
    values = json.loads((folder / "manifest.json").read_text())
    values_of(values)
    (folder / "manifest.json").write_text(json.dumps({**values, "digest": _digest(values)}))


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("/etc/shard.h5", "file `/etc/shard.h5` is outside the manifest's folder."),
        ("../d/" + SHARD, f"file `../d/{SHARD}` is outside the manifest's folder."),
        ("a/../../b.h5", "file `a/../../b.h5` is outside the manifest's folder."),
        ("", "file `` cannot be the name of a file."),
        (".", "file `.` cannot be the name of a file."),
        ("a\0.h5", "file `a\\x00.h5` cannot be the name of a file."),
        ("x" * 10**6, f"file `{'x' * 100}... (1,000,000 characters)` cannot be the name of a file."),
    ],
)
def test_names_that_are_none_of_the_folder(folder: Path, name: str, seen: str) -> None:
    list_files(folder, SHARD, name)
    assert refused(folder) == f"{folder}/manifest.json: {seen} {REWRITE}"


@pytest.mark.parametrize("of_folder", [False, True], ids=["file", "folder"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, of_folder: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    name = f"part/{SHARD}" if of_folder else SHARD
    list_files(folder, name)
    (folder / SHARD).rename(elsewhere / SHARD)
    (folder / ("part" if of_folder else SHARD)).symlink_to(elsewhere / ("" if of_folder else SHARD))
    assert refused(folder) == (
        f"{folder}/manifest.json: file `{name}` is a link to {elsewhere / SHARD}, outside the manifest's "
        "folder. Copy the file to its place, or name the shards by a glob pattern, which takes links."
    )
    assert num_rows(f"{folder}/**/*.h5") == ROWS
    if not of_folder:
        (folder / SHARD).unlink()
        (elsewhere / SHARD).rename(folder / SHARD)
        assert num_rows(folder) == ROWS


def test_links_that_stay_with_the_manifest(folder: Path, tmp_path: Path) -> None:
    """Within the folder; and of a folder of links to files that are together, as some caches have them."""
    (folder / SHARD).rename(folder / "1.h5")
    (folder / SHARD).symlink_to("1.h5")
    assert num_rows(folder) == ROWS
    named = tmp_path / "named"
    named.mkdir()
    (named / "manifest.json").symlink_to(folder / "manifest.json")
    (named / SHARD).symlink_to(folder / "1.h5")
    assert num_rows(named) == ROWS


def test_a_link_to_nothing(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("none.h5")
    assert (
        refused(folder) == f"{folder}/{SHARD}: no such file. Expected an HDF5 file that every rank can see."
    )
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)
    assert refused(folder).startswith(f"{folder}/{SHARD}: [Errno 40] Too many levels of symbolic links: ")


@pytest.mark.parametrize("num_samples", [ROWS + 1, 0, -1, 2**62])
def test_wrong_counts(folder: Path, num_samples: int) -> None:
    change(folder, lambda values: values["train"][0].update(num_samples=num_samples))
    assert refused(folder) == (
        f"{folder}/{SHARD}: {ROWS} samples, but {num_samples} in {folder}/manifest.json. Copy both again, or "
        "write the shards again."
    )


def test_a_file_that_is_listed_twice(folder: Path) -> None:
    list_files(folder, SHARD, f"./{SHARD}")
    assert refused(folder) == (
        f"{folder}/./{SHARD}: the same file as {folder}/{SHARD}, under another name. Expected every row "
        "once, or it counts twice: leave one of them out."
    )


def test_many_files_that_are_not_there(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    entry = values["train"][0]
    change(folder, lambda values: values.update(train=[{**entry, "file": f"{i}.h5"} for i in range(20_000)]))
    assert refused(folder) == f"{folder}/0.h5: no such file. Expected an HDF5 file that every rank can see."


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("train", {}, "Expected `array`, got `object` - at `$.train`"),
        ("train", None, "Expected `array`, got `null` - at `$.train`"),
        ("train", [[]], "Expected `object`, got `array` - at `$.train[0]`"),
        ("train", [{"file": 1, "num_samples": 2}], "Expected `str`, got `int` - at `$.train[0].file`"),
        (
            "train",
            [{"file": "a.h5", "num_samples": 2.5}],
            "Expected `int`, got `float` - at `$.train[0].num_samples`",
        ),
        ("train", [{"file": "a.h5"}], "Object missing required field `num_samples` - at `$.train[0]`"),
        ("sample", [], "Expected `object`, got `array` - at `$.sample`"),
        ("digest", 7, "Expected `str | null`, got `int` - at `$.digest`"),
    ],
)
def test_values_of_another_type(folder: Path, key: str, value: Any, seen: str) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, key: value}))
    assert refused(folder) == f"{folder}/manifest.json: not a manifest: {seen}. {REWRITE}"


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b"", "Input data was truncated"),
        (b'{"schema": 2, "train": [', "Input data was truncated"),
        (b'{"schema": NaN}', "JSON is malformed: invalid character (byte 11)"),
        (b'{"schema": 2, "scale": Infinity}', "JSON is malformed: invalid character (byte 23)"),
        (b'{"schema": 2}\n{}', "JSON is malformed: trailing characters (byte 15)"),
        (b"\xff\xfe{\0}\0", "JSON is malformed: invalid character (byte 0)"),
        (
            b'{"schema": 2, "\xff": 1}',
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b"[" * 10**6, "maximum recursion depth exceeded while deserializing an object"),
        (
            b'{"schema": 2, "deep": ' + b'{"a": ' * 10**5 + b"1" + b"}" * (10**5 + 1),
            "maximum recursion depth exceeded",
        ),
    ],
)
def test_what_is_not_json(folder: Path, content: bytes, seen: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    message = refused(folder)
    assert message.startswith(f"{folder}/manifest.json: not valid JSON: {seen}")
    assert message.endswith(f". {REWRITE}")


def test_numbers_beyond_every_type(folder: Path) -> None:
    change(folder, lambda values: values["train"][0].update(num_samples=10**400))
    assert refused(folder).startswith(f"{folder}/{SHARD}: {ROWS} samples, but 1000000000")


def test_a_manifest_of_a_terabyte(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert refused(folder) == (
        f"{folder}/manifest.json: 1,099,511,627,776 bytes, expected at most 1,073,741,824. {REWRITE}"
    )
