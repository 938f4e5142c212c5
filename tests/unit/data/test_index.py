"""The index of a folder: what it saves, and that nothing in it is trusted."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import index as module
from hvd_train.data.catalog import Catalog, find_shards, open_catalog, whole
from hvd_train.data.facts import digest
from hvd_train.data.index import INDEX_NAME
from hvd_train.data.rows import Rows
from hvd_train.data.selection import select_rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from hvd_train.tools import shard
from tests.unit.data.shards import opened_files, row_numbers, write_foreign
from tests.unit.data.swmr import Writer

OLD_S = 1_000_000_000
TARGETS = {"shape": [], "dtype": "int64"}
AGAIN = "Write it again with the data options of the training: `hvd_train shard index "


def age(folder: Path) -> None:
    """Gives the files of a folder an old time."""
    for path in folder.glob("*.h5"):
        os.utime(path, (OLD_S, OLD_S))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    for i in range(4):
        write_foreign(tmp_path / "d" / f"{i}.h5", 10 + i, 100 * i)
    age(tmp_path / "d")
    assert shard.main(["index", str(tmp_path / "d")]) == 0
    return tmp_path / "d"


@pytest.fixture
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from now on."""
    return opened_files(monkeypatch)


def change(folder: Path, **values: Any) -> None:
    """Puts other values into the index, those of `kinds` and of the first file, with the right digest."""
    path = folder / INDEX_NAME
    body = msgspec.json.decode(path.read_bytes().split(b"\n")[1])
    for key, value in values.items():
        place = body["files"]["0.h5"] if key in body["files"]["0.h5"] else body["kinds"][0]
        place[key] = value
    text = msgspec.json.encode(body)
    path.write_bytes(msgspec.json.encode({"schema": 1, "digest": digest(text)}) + b"\n" + text + b"\n")


def rows_of(catalog: Catalog) -> list[int]:
    rows = Rows(catalog.train, catalog.sample.fields, known=catalog.shards)
    try:
        return row_numbers(rows.read(0, len(rows)))
    finally:
        rows.close()


NUMBERS = [100 * i + row for i in range(4) for row in range(10 + i)]


def test_no_file_is_opened_before_its_rows_are_read(folder: Path, opened: list[str]) -> None:
    data = DataConfig(path=str(folder))
    catalog = open_catalog(data)
    assert opened == []
    assert catalog.warnings == ()
    (folder / INDEX_NAME).unlink()
    read = open_catalog(data)
    assert opened == ["0.h5", "1.h5", "2.h5", "3.h5"]
    assert [replace(info, class_counts=None) for info in catalog.shards] == list(read.shards)
    assert (catalog.sample, catalog.train) == (read.sample, read.train)
    assert (catalog.labels.count, catalog.labels.different) == (read.labels.count, read.labels.different)
    assert catalog.shards[1].class_counts == tuple(np.bincount(np.arange(100, 111) % 7))
    del opened[:]
    assert rows_of(catalog) == NUMBERS
    assert opened == ["0.h5", "1.h5", "2.h5", "3.h5"]


def test_what_it_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(folder / "new.h5", 3)
    path = write_foreign(folder / "future.h5", 3)
    os.utime(path, (2 * OLD_S, 4 * OLD_S))
    assert shard.main(["index", str(folder)]) == 0
    assert capsys.readouterr().out == (
        f"{folder / INDEX_NAME}: the headers of 5 files\n"
        f"left out: {path}: it is being written, or its time is in the future\n"
    )


@pytest.mark.parametrize("changed", ["time", "size", "new"])
def test_a_file_that_is_another_one_is_opened(folder: Path, opened: list[str], changed: str) -> None:
    name = "9.h5" if changed == "new" else "2.h5"
    if changed == "time":
        os.utime(folder / name, (OLD_S, OLD_S + 1))
    else:
        write_foreign(folder / name, 40, 900)
        os.utime(folder / name, (OLD_S, OLD_S))
    catalog = open_catalog(DataConfig(path=str(folder)))
    assert opened == [name]
    total = 5 if changed == "new" else 4
    assert catalog.warnings == (
        f"{folder / INDEX_NAME}: 1 of {total} files are not as it records them: their headers were read. "
        f"{AGAIN}{folder}`.",
    )
    assert len(rows_of(catalog)) == {"time": 46, "size": 74, "new": 86}[changed]
    age(folder)
    assert shard.main(["index", str(folder)]) == 0
    assert open_catalog(DataConfig(path=str(folder))).warnings == ()


def test_other_fields_do_not_use_it(folder: Path, opened: list[str]) -> None:
    data = DataConfig(path=str(folder), inputs="inputs[1:]")
    line = (
        f"{folder / INDEX_NAME}: written for other fields or by another version of hvd_train. The headers of "
        f"the files were read. {AGAIN}{folder}`."
    )
    assert find_shards(data).warnings == (line,)
    assert len(opened) == 4
    assert shard.main(["index", str(folder), "--data.inputs", "inputs[1:]"]) == 0
    del opened[:]
    assert find_shards(data).warnings == ()
    assert opened == []


def test_the_fields_of_a_configuration(folder: Path, opened: list[str], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'[data]\npath = "{folder}"\ninputs = "inputs[1:]"\n')
    assert shard.main(["index", "--config", str(config)]) == 0
    del opened[:]
    find_shards(DataConfig(path=str(folder), inputs="inputs[1:]"))
    assert opened == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _schema(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"schema":1', b'"schema":7', 1))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _deep(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "not what was written: it was damaged or changed."),
        (_schema, "schema 7; this program reads schema 1."),
        (_deep, "not an index: "),
        (_fifo, "is a named pipe (FIFO). Expected the index that `hvd_train shard index` writes: "),
        (lambda path: path.write_bytes(b"\xff\n\xff"), "not an index: "),
        (lambda path: path.write_bytes(b""), "not an index: "),
        (lambda path: path.write_bytes(bytes(2000)), "2,000 bytes, expected at most 1,000."),
    ],
)
def test_a_damaged_index_is_left_out(
    folder: Path, opened: list[str], damage: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "1,000" in reason:
        monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    damage(folder / INDEX_NAME)
    catalog = open_catalog(DataConfig(path=str(folder)))
    (line,) = catalog.warnings
    assert line.startswith(f"{folder / INDEX_NAME}: {reason}")
    assert line.endswith(f" The headers of the files were read. {AGAIN}{folder}`.")
    assert len(opened) == 4
    assert rows_of(catalog) == NUMBERS


@pytest.mark.parametrize(
    "values",
    [
        {"num_samples": -1},
        {"num_samples": 0},
        {"num_samples": 2**62},
        {"kind": 99},
        {"kind": -1},
        {"class_counts": [-1, 11]},
        {"growing": True},
        {"checksum_rows": 0},
        {"fields": {}, "layouts": {}},
    ],
)
def test_what_makes_no_sense_is_read_from_the_file(
    folder: Path, opened: list[str], values: dict[str, Any]
) -> None:
    change(folder, **values)
    catalog = open_catalog(DataConfig(path=str(folder)))
    assert "0.h5" in opened
    assert rows_of(catalog) == NUMBERS


@pytest.mark.parametrize("key", ["place", "axis", "follow_links", "dtype"])
def test_a_field_at_another_place_is_read_from_the_file(folder: Path, opened: list[str], key: str) -> None:
    """Files are opened by what their fields say: an index must not name other datasets, or follow links."""
    other = {"place": "targets", "axis": 1, "follow_links": True, "dtype": "O"}[key]
    field = {"shape": [3], "dtype": "float32", key: other}
    change(folder, fields={"inputs": field, "targets": TARGETS})
    catalog = open_catalog(DataConfig(path=str(folder)))
    assert "0.h5" in opened
    assert rows_of(catalog) == NUMBERS


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"num_samples": 9, "class_counts": [9]}, "header"),
        ({"fields": {"inputs": {"shape": [4], "dtype": "float32"}, "targets": TARGETS}}, "header"),
        ({"facts_digest": "0" * 32}, "header"),
        ({"unpacked": ["`inputs` is halved"]}, "header"),
        ({"scale": 0.5}, "scale"),
        ({"class_counts": [10]}, "number of rows of each class"),
        ({"class_counts": [0] * 300 + [10]}, "number of rows of each class"),
    ],
)
def test_what_is_wrong_is_found_when_the_file_is_opened(
    folder: Path, values: dict[str, Any], what: str
) -> None:
    change(folder, **values)
    data = DataConfig(path=str(folder / "0.h5"))
    with pytest.raises(DataError) as error:
        rows_of(open_catalog(data))
    assert str(error.value) == (
        f"{folder / '0.h5'}: its {what} is not what the index of its folder records. The index is damaged, "
        "or the file was changed and given its old time. Write the index again, with the data options of the "
        f"training: `hvd_train shard index {folder}`."
    )
    assert shard.main(["index", str(folder)]) == 0
    assert rows_of(open_catalog(data)) == NUMBERS[:10]


def test_names_in_it_lead_to_no_file(folder: Path, opened: list[str], tmp_path: Path) -> None:
    write_foreign(tmp_path / "outside.h5", 5)
    path = folder / INDEX_NAME
    body = msgspec.json.decode(path.read_bytes().split(b"\n")[1])
    for name in ("../outside.h5", str(tmp_path / "outside.h5"), "\0", ""):
        body["files"][name] = body["files"]["0.h5"]
    text = msgspec.json.encode(body)
    path.write_bytes(msgspec.json.encode({"schema": 1, "digest": digest(text)}) + b"\n" + text)
    assert rows_of(open_catalog(DataConfig(path=str(folder)))) == NUMBERS
    assert set(opened) == {"0.h5", "1.h5", "2.h5", "3.h5"}


def test_shards_of_a_manifest(tmp_path: Path) -> None:
    write_part(tmp_path, Arrays(np.arange(60).reshape(20, 3), np.arange(20) % 3, 0.5), shards=2)
    data = DataConfig(path=str(tmp_path))
    read = find_shards(data)
    age(tmp_path)
    assert shard.main(["index", str(tmp_path)]) == 0
    found = find_shards(data)
    assert found == read
    assert found.train[0].indexed == ("inputs", "targets")
    rows = Rows(whole(found.train), found.sample.fields, known=found.train)
    assert rows.read(0, 20)["inputs"].tolist() == np.arange(60).reshape(20, 3).tolist()
    rows.close()
    change_first = msgspec.json.decode((tmp_path / INDEX_NAME).read_bytes().split(b"\n")[1])
    assert [file["class_counts"] for file in change_first["files"].values()] == [[4, 3, 3], [3, 4, 3]]


def test_what_has_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x/inputs"], file["x/targets"] = np.zeros((4, 2)), np.arange(4)
    groups = ["--data.inputs", "*/inputs", "--data.targets", "*/targets"]
    for options, reason in (
        (groups, "to know the groups of a file, it has to be opened"),
        (
            ["--data.follow-links"],
            "size and time of a file do not tell whether those have changed that its links lead to",
        ),
    ):
        assert shard.main(["index", str(path), *options]) == 2
        assert capsys.readouterr().err == (
            f"hvd_train: {path}: such files have no index, as {reason}. Train without one.\n"
        )
    assert not (tmp_path / INDEX_NAME).exists()


def test_a_file_that_grows_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer(tmp_path / "a.h5") as writer:
        writer.add(10)
        age(tmp_path)
        assert shard.main(["index", str(tmp_path)]) == 0
    assert f"left out: {tmp_path / 'a.h5'}: a program is writing it (SWMR)\n" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / INDEX_NAME).mkdir()
    assert shard.main(["index", str(folder)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"hvd_train: {re.escape(str(folder))}: the index cannot be written: .+\. Expected a folder that "
        r"this user can write: a training reads an index beside its files only\.\n",
        said,
    )
    assert len(open_catalog(DataConfig(path=str(folder))).warnings) == 1


def test_some_of_its_fields_are_enough(folder: Path, opened: list[str]) -> None:
    """To predict, targets are not read."""
    sample = open_catalog(DataConfig(path=str(folder))).sample
    selected = select_rows(str(folder), sample, ("inputs",))
    assert opened == []
    assert list(selected.fields) == ["inputs"]
    rows = Rows(selected.spans, selected.fields, known=selected.shards)
    assert rows.read(0, 46)["inputs"][:, 0].tolist() == NUMBERS
    rows.close()
    with pytest.raises(DataError, match="no dataset `id`"):
        select_rows(str(folder), sample, ("inputs", "id"))
