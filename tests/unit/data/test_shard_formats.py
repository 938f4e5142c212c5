"""Shards from files of every kind, and what is said about rows that cannot be written."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import locate
from hvd_train.data.manifest import load_manifest
from hvd_train.data.places import plain
from hvd_train.tools.shard import main

ROWS = 40
X = np.arange(ROWS * 6, dtype="f4").reshape(ROWS, 2, 3)
Y = np.arange(ROWS) % 4


def read(folder: Path, *names: str) -> list[npt.NDArray[Any]]:
    """The fields of the train part."""
    pieces = []
    for found in locate(str(folder), "PATH").train:
        with ShardFile(found.path, plain(names)) as shard:
            pieces.append([shard.read(name, 0, shard.info.num_samples) for name in names])
    return [np.concatenate(columns) for columns in zip(*pieces, strict=True)]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said of a request that cannot be carried out."""
    assert main(["write", *args]) == 2
    return capsys.readouterr().err.removeprefix("hvd_train: ").rstrip("\n")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_further_fields(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", x=X, y=Y, w=np.ones(ROWS))
    options = ["--inputs", "x", "--targets", "y", "--fields", "weight", "w", "--shards", "3"]
    assert main(["write", str(tmp_path / "a.npz"), *options, "--out", str(tmp_path / "d")]) == 0
    inputs, targets, weight = read(tmp_path / "d", "inputs", "targets", "weight")
    np.testing.assert_array_equal(inputs, X)
    np.testing.assert_array_equal(targets, Y)
    assert weight.sum() == ROWS


def test_npz_by_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.asfortranarray(X), targets=Y)
    assert main(["write", str(tmp_path / "a.npz"), "--out", str(tmp_path / "d")]) == 0
    np.testing.assert_array_equal(read(tmp_path / "d", "inputs")[0], X)
    np.savez_compressed(tmp_path / "b.npz", inputs=np.asfortranarray(X), targets=Y)
    said = refused(capsys, str(tmp_path / "b.npz"), "--out", str(tmp_path / "e"))
    assert "compressed and stored by columns" in said
    np.savez_compressed(tmp_path / "b.npz", inputs=np.ascontiguousarray(X), targets=Y)
    assert main(["write", str(tmp_path / "b.npz"), "--out", str(tmp_path / "e")]) == 0


def test_npy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y, short = (str(tmp_path / f"{name}.npy") for name in ("x", "y", "short"))
    np.save(x, X.astype(">f4"))
    np.save(y, Y)
    np.save(short, Y[:7])
    assert main(["write", x, y, "--fields", "again", x, "--out", str(tmp_path / "d")]) == 0
    inputs, again = read(tmp_path / "d", "inputs", "again")
    np.testing.assert_array_equal(inputs, X)
    np.testing.assert_array_equal(again, X)
    said = refused(capsys, x, short, "--out", str(tmp_path / "e"))
    assert said.startswith(f"{x} and {short}: 40 inputs and 7 targets. Expected the same number of each")
    assert "3 .npy files. Expected two" in refused(capsys, x, y, x, "--out", str(tmp_path / "e"))


def test_hdf5_of_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = np.zeros(ROWS, [("a", "f4"), ("b", "f8"), ("kind", "i2")])
    table["a"], table["kind"] = np.arange(ROWS), Y
    for name in ("1.h5", "2.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["t"] = table
            file.create_dataset("g/x", data=X, chunks=(7, 2, 2), compression="gzip")
    options = ["--inputs", "t[a,b]", "--targets", "t[kind]", "--fields", "x", "g/x[0,:]"]
    paths = [str(tmp_path / "1.h5"), str(tmp_path / "2.h5")]
    assert main(["write", *paths, *options, "--out", str(tmp_path / "d"), "--shards", "3"]) == 0
    inputs, targets, x = read(tmp_path / "d", "inputs", "targets", "x")
    np.testing.assert_array_equal(inputs[:, 0], np.tile(np.arange(ROWS), 2))
    np.testing.assert_array_equal(targets, np.tile(Y, 2))
    np.testing.assert_array_equal(x, np.tile(X[:, 0], (2, 1)))
    with h5py.File(paths[1], "a") as file:
        del file["t"]
        file["t"] = table.astype([("a", "f4"), ("b", "f4"), ("kind", "i2")])
    said = refused(capsys, *paths, *options, "--out", str(tmp_path / "e"))
    assert said == (
        f"{paths[1]}: a sample of `inputs` is float32 [2], but float64 [2] in {paths[0]}. Expected the same "
        "in "
        "every file: leave one of the two out."
    )


CSV = "name,a,b,kind\nu,1,0.5,cat\nv,2,1.5,dog\nw,3,2.5,cat\n"


@pytest.mark.parametrize("packed", [False, True])
def test_csv(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(CSV.encode()) if packed else CSV.encode())
    options = ["--inputs", "a,b", "--targets", "kind", "--classes", "dog", "cat"]
    assert main(["write", str(path), *options, "--out", str(tmp_path / "d")]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    assert (inputs.tolist(), targets.tolist()) == ([[1, 0.5], [2, 1.5], [3, 2.5]], [1, 0, 1])
    manifest = load_manifest(tmp_path / "d")
    assert manifest is not None
    assert manifest.class_names == ("dog", "cat")


def test_csv_inputs_are_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x\ty\ttargets\n1\t2\t0.5\n3\t4\t1\n")
    assert main(["write", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "d")]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    assert (inputs.dtype, inputs.tolist(), targets.tolist()) == (np.int64, [[1, 2], [3, 4]], [0.5, 1])


def test_types_of_a_csv_are_those_of_all_rows(tmp_path: Path) -> None:
    """Not of the first block alone: the last value decides here."""
    rows = 400_000
    lines = "\n".join(f"{i},{i % 3}" for i in range(rows))
    (tmp_path / "a.csv").write_text(f"x,targets\n{lines}\n0.5,1\n")
    assert (tmp_path / "a.csv").stat().st_size > 3 << 20
    assert main(["write", str(tmp_path / "a.csv"), "--inputs", "x", "--out", str(tmp_path / "d")]) == 0
    (inputs,) = read(tmp_path / "d", "inputs")
    assert (inputs.dtype, inputs[-2], inputs[-1], len(inputs)) == (np.float64, rows - 1, 0.5, rows + 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            CSV,
            ["--targets", "kind", "--inputs", "a"],
            "a.csv: row 0: column `kind` holds `cat`. Expected a number. If these are classes, name the "
            "column "
            "in --targets and list its texts in --classes; else name other columns in --inputs.",
        ),
        (
            CSV,
            ["--targets", "kind", "--classes", "cat", "--inputs", "a"],
            "a.csv: row 1: column `kind` holds `dog`. Expected one of --classes: `cat`. Add it there, or "
            "leave "
            "out such rows.",
        ),
        (
            "a,targets\n1,2\n,3\n",
            [],
            "a.csv: row 1: the value of column `a` is missing. Expected one in every row: fill it in, or "
            "leave "
            "out such rows.",
        ),
        (
            "a,targets\n1,2\n1,2,3\n",
            [],
            "a.csv: CSV parse error: Row #3: Expected 2 columns, got 3: 1,2,3. Expected a complete CSV file: "
            "correct it, or copy it again.",
        ),
        (
            CSV,
            ["--targets", "sort"],
            "a.csv: no column `sort`; the file has `name`, `a`, `b`, `kind`. Name others with --targets.",
        ),
        ("a,targets\n", [], "a.csv: 0 rows. Expected at least 1."),
    ],
)
def test_rows_of_a_csv_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(text)
    assert refused(capsys, "a.csv", *options, "--out", "d") == message


def test_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "a.parquet")
    names = pyarrow.array(np.where(Y == 0, "no", "yes").tolist()).dictionary_encode()
    table = pyarrow.table({"vector": X.reshape(ROWS, 6).tolist(), "kind": names, "w": Y.astype("f4")})
    parquet.write_table(table, path, row_group_size=7)
    options = ["--inputs", "vector", "--targets", "kind", "--classes", "no", "yes", "--fields", "w", "w"]
    assert main(["write", path, *options, "--out", str(tmp_path / "d"), "--shards", "2"]) == 0
    inputs, targets, weight = read(tmp_path / "d", "inputs", "targets", "w")
    np.testing.assert_array_equal(inputs, X.reshape(ROWS, 6))
    np.testing.assert_array_equal(targets, Y != 0)
    np.testing.assert_array_equal(weight, Y)
    said = refused(capsys, path, "--inputs", "vector", "--targets", "kind", "--out", str(tmp_path / "e"))
    assert "row 0: column `kind` is of type dictionary<" in said
    assert "list its texts in --classes" in said


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            [[1.0, 2.0], [1.0]],
            "row 1: column `inputs` has 1 values, but 2 in row 0. Expected as many in every",
        ),
        ([1.0, None], "row 1: the value of column `inputs` is missing. Expected one in every row"),
        ([[1.0], [None]], "rows 0 to 1: a value in a list of column `inputs` is missing. Expected numbers"),
    ],
)
def test_rows_of_a_parquet_file_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: list[Any], message: str
) -> None:
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"inputs": column, "targets": [0, 1]}), path)
    assert message in refused(capsys, path, "--out", str(tmp_path / "e"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for kind, level in (("dog", 20), ("cat", 10)):
        (tmp_path / "p" / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((4, 5), level + i, "u1")).save(tmp_path / "p" / kind / f"{i}.png")
    return tmp_path / "p"


def test_images(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["write", str(pictures), "--out", str(tmp_path / "d")]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    assert (inputs.shape, inputs.dtype) == ((6, 4, 5), np.uint8)
    assert inputs[:, 0, 0].tolist() == [10, 11, 12, 20, 21, 22]
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    manifest = load_manifest(tmp_path / "d")
    assert manifest is not None
    assert (manifest.class_names, manifest.sample.scale) == (("cat", "dog"), 1 / 255)
    Image.fromarray(np.zeros((6, 5), "u1")).save(pictures / "dog" / "9.png")
    said = refused(capsys, str(pictures), "--out", str(tmp_path / "e"))
    assert said == (
        f"{pictures}/dog/9.png: 6 pixels high and 5 wide, but 4 and 5 in {pictures}/cat/0.png. Expected one "
        "size: add --resize 4 5, or another height and width."
    )
    assert main(["write", str(pictures), "--out", str(tmp_path / "e"), "--resize", "4", "5"]) == 0
    assert read(tmp_path / "e", "inputs")[0].shape == (7, 4, 5)


def test_parts_with_other_classes(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["write", str(pictures), "--out", str(tmp_path / "d")]) == 0
    assert (
        capsys.readouterr().out == f"{tmp_path}/d/train-00000-of-00001.h5: 6 samples\nclasses: 0 cat, 1 dog\n"
    )
    (pictures / "cat").rename(pictures / "fox")
    said = refused(capsys, str(pictures), "--out", str(tmp_path / "d"), "--part", "validation")
    assert said.startswith(
        f"{tmp_path}/d/manifest.json: the other part has class names ('cat', 'dog'), these samples have "
    )


def test_images_that_cannot_be_written(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((4, 5, 3), "u1")).save(pictures / "dog" / "9.png")
    said = refused(capsys, str(pictures), "--out", str(tmp_path / "e"))
    assert said.startswith(f"{pictures}/dog/9.png: has colours, but {pictures}/cat/0.png has none.")
    whole = (pictures / "dog" / "1.png").read_bytes()
    (pictures / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    said = refused(capsys, str(pictures), "--out", str(tmp_path / "e"))
    assert said.startswith(f"{pictures}/dog/1.png: ")
    assert said.endswith("Expected an image such as .png: copy it again, convert it, or leave it out.")


@pytest.mark.parametrize(
    ("module", "source", "extra"), [("pyarrow", "a.csv", "parquet"), ("pyarrow", "a.parquet", "parquet")]
)
def test_a_missing_package_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    source: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    said = refused(capsys, str(tmp_path / source), "--out", str(tmp_path / "d"))
    assert said.endswith(f"which is not installed. Install it: `pip install 'hvd_train[{extra}]'`.")


def test_images_need_pillow(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvd_train.data.sources.pillow.find_spec", lambda _: None)
    said = refused(capsys, str(pictures), "--out", str(pictures / "d"))
    assert (
        said
        == "images are read by Pillow, which is not installed. Install it: `pip install 'hvd_train[images]'`."
    )


TEXT = "one line\nand a second line\n" * 20


@pytest.mark.parametrize("tokenizer", ["bytes", "words.py:letters"])
def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.py").write_text("def letters(line):\n    return [ord(letter) + 1 for letter in line]\n")
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(TEXT)
    options = ["--length", "16", "--tokenizer", tokenizer, "--shards", "2", "--out", "d"]
    assert main(["write", "a.txt", "b.txt", *options]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    tokens = np.frombuffer((2 * TEXT).encode(), np.uint8).astype(int) + (tokenizer != "bytes")
    rows = (len(tokens) - 1) // 16
    assert inputs.dtype == ("u1" if tokenizer == "bytes" else "i4")
    np.testing.assert_array_equal(inputs, tokens[: rows * 16].reshape(rows, 16))
    np.testing.assert_array_equal(targets, tokens[1 : rows * 16 + 1].reshape(rows, 16))


@pytest.mark.parametrize(
    ("tokenizer", "content", "message"),
    [
        ("bytes", b"short", "a.txt: 5 bytes. Expected more than the 16 tokens of a sequence: give more text"),
        ("letters", b"x" * 50, "--tokenizer letters: expected `bytes`, `file.py:function` or"),
        ("words.py:no", b"x" * 50, "--tokenizer words.py:no: words.py has no function no"),
        ("nowhere.py:no", b"x" * 50, "--tokenizer: there is no file nowhere.py; expected the Python file"),
        ("words.py:wrong", b"a" * 50, "a.txt: line 1: --tokenizer words.py:wrong gave float64 [1]. Expected"),
        ("words.py:fails", b"a" * 50, "a.txt: line 1: --tokenizer words.py:fails raised KeyError: 'a'"),
        ("words.py:wrong", b"\xff" * 50, "a.txt: line 1: invalid start byte. Expected text in UTF-8"),
    ],
)
def test_text_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: str,
    content: bytes,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.py").write_text(
        "def wrong(line):\n    return [0.5]\n\ndef fails(line):\n    return [{}[c] for c in line]\n"
    )
    Path("a.txt").write_bytes(content)
    said = refused(capsys, "a.txt", "--length", "16", "--tokenizer", tokenizer, "--out", "d")
    assert said.startswith(message)


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def png(level: int, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, 5), level, "u1")).save(file, "png")
    return file.getvalue()


def test_webdataset(tmp_path: Path) -> None:
    first = tar(
        tmp_path / "1.tar", {f"a/{i}.{e}": c for i in range(3) for e, c in (("png", png(i)), ("cls", b"1"))}
    )
    second = tar(tmp_path / "2.tar", {"b/0.cls": b"0\n", "b/0.png": png(9), "b/0.json": b"{}"})
    assert main(["write", first, second, "--out", str(tmp_path / "d")]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    assert (inputs[:, 0, 0].tolist(), targets.tolist()) == ([0, 1, 2, 9], [1, 1, 1, 0])


def test_webdataset_of_arrays_and_classes(tmp_path: Path) -> None:
    members = {}
    for i in range(5):
        file = io.BytesIO()
        np.save(file, X[i])
        members |= {f"{i}.x.npy": file.getvalue(), f"{i}.txt": b"odd" if i % 2 else b"even"}
    options = ["--inputs", "x.npy", "--targets", "txt", "--classes", "even", "odd", "--shards", "2"]
    assert main(["write", tar(tmp_path / "1.tar", members), *options, "--out", str(tmp_path / "d")]) == 0
    inputs, targets = read(tmp_path / "d", "inputs", "targets")
    np.testing.assert_array_equal(inputs, X[:5])
    assert targets.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.png": png(0), "0.cls": b"cat"},
            "1.tar: 0.cls holds `cat`. Expected a number. If these are classes",
        ),
        ({"0.png": png(0)}, "1.tar: 0: no member `.cls`, but `.png`. Expected one in every sample"),
        (
            {"0.png": png(0), "0.cls": b"1", "1.png": png(0, 6), "1.cls": b"1"},
            "1.tar: 1.png: 6 pixels high and 5 wide, but 4 and 5 in 1.tar: 0.png. Expected one size",
        ),
        (
            {"0.png": png(0), "0.cls": b"1", "1.png": png(0), "1.cls": b"0.5"},
            "1.tar: 1.cls is float64 [], but int64 [] in the first sample. Expected the same",
        ),
        ({}, "1.tar: no samples. Expected members such as"),
    ],
)
def test_samples_of_a_webdataset_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    members: dict[str, bytes],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    tar(Path("1.tar"), members)
    assert refused(capsys, "1.tar", "--out", "d").startswith(message)
    Path("1.tar").write_bytes(b"no tar file at all")
    assert "Expected a complete tar file: copy it again." in refused(capsys, "1.tar", "--out", "d")
