"""`shard write --from`: shards of a Python dataset."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.manifest import load_manifest
from hvd_train.data.python import registry
from hvd_train.data.python.iterated import Iterated
from hvd_train.data.sources import base
from hvd_train.data.sources.python_dataset import PythonDataset
from hvd_train.tools.shard import main
from tests.unit.data.python_datasets import limited, seen, write_module
from tests.unit.data.shards import row_numbers

NAMED = """
class Patients(Plain):
    def __getitem__(self, i):
        SEEN.append(i)
        animal, weight = ["cat", "dog"][i % 2], np.float16(i)
        return {"picture": inputs_of(i), "animal": animal, "kilos": weight, "owner": f"owner {i // 10}"}
"""


def written(folder: Path) -> dict[str, Any]:
    """The rows of the shards, in their order."""
    parts = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            parts.append({name: file[name][()] for name in file if name[0] != "_"})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["write", *args]) == 2
    return capsys.readouterr().err.removeprefix("hvd_train: ").rstrip("\n")


@pytest.mark.parametrize("dataset", ["Plain", "Known", "Streamed", "generated"])
def test_rows_in_their_order(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few rows; those of an iterable are not held in memory."""
    monkeypatch.setattr(base, "BLOCK_BYTES", 7 * 20)
    limited(monkeypatch, 0)
    name = f"{write_module(tmp_path)}:{dataset}"
    folder = tmp_path / "shards"
    assert main(["write", "--from", name, "--out", str(folder), "--shards", "4"]) == 0
    rows = written(folder)
    assert (rows["inputs"].dtype, rows["targets"].dtype) == (np.float32, np.int64)
    assert row_numbers(rows) == list(range(60))
    if dataset == "Plain":
        assert set(Counter(seen()).values()) <= {1, 2}, "the first sample twice"
        assert len(seen()) == 61
    made = registry.made_of(name)
    assert not isinstance(made, Iterated) or not made._held


def test_fields_by_name_with_classes_and_groups(tmp_path: Path) -> None:
    name, folder = f"{write_module(tmp_path, NAMED)}:Patients", tmp_path / "shards"
    args = [
        "--inputs",
        "picture",
        "--targets",
        "animal",
        "--classes",
        "dog",
        "cat",
        "--fields",
        "weight",
        "kilos",
    ]
    args += ["--split", "validation=0.5", "--group", "owner"]
    assert main(["write", "--from", name, "--out", str(folder), *args]) == 0
    rows = written(folder)
    numbers = rows["inputs"][:, 0].astype(int)
    assert sorted(numbers) == list(range(60))
    assert rows["targets"].tolist() == [1 - i % 2 for i in numbers]
    assert rows["weight"].tolist() == numbers.tolist()
    manifest = load_manifest(folder)
    assert manifest is not None
    (train,) = manifest.train
    with h5py.File(folder / train.file) as file:
        owners = Counter((file["inputs"][:, 0] // 10).tolist())
    assert set(owners.values()) == {10}


def test_names_of_classes(tmp_path: Path) -> None:
    """Of texts, of numbers, and those of the dataset."""
    path = write_module(tmp_path, NAMED + "\nclass Own(Plain):\n    classes = list('abcdefg')")
    names = ["v", "w", "x", "y", "z", "q", "r"]
    for out, dataset, args, expected in (
        (
            "a",
            "Patients",
            ["--inputs", "picture", "--targets", "animal", "--classes", "dog", "cat"],
            "dog cat",
        ),
        ("b", "Plain", ["--classes", *names], " ".join(names)),
        ("c", "Own", [], "a b c d e f g"),
        ("d", "Plain", [], ""),
    ):
        assert main(["write", "--from", f"{path}:{dataset}", "--out", str(tmp_path / out), *args]) == 0
        manifest = load_manifest(tmp_path / out)
        assert manifest is not None
        assert manifest.class_names == tuple(expected.split())


@pytest.mark.parametrize("dataset", ["Plain", "generated"])
def test_shuffled_and_by_class(dataset: str, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:{dataset}"
    shuffled, by_class = tmp_path / "shuffled", tmp_path / "by_class"
    assert main(["write", "--from", name, "--out", str(shuffled), "--shuffle"]) == 0
    assert sorted(row_numbers(written(shuffled))) == list(range(60)) != row_numbers(written(shuffled))
    assert main(["write", "--from", name, "--out", str(by_class), "--by-class", "--shards", "7"]) == 0
    rows = written(by_class)
    assert rows["targets"].tolist() == sorted(i % 7 for i in range(60))


def test_a_known_target_is_not_read_to_count_classes(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Known"
    assert main(["write", "--from", name, "--out", str(tmp_path / "a"), "--by-class", "--shards", "7"]) == 0
    assert len(seen()) == 61


def test_a_call_that_was_ended_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the row after the shards that are complete."""
    monkeypatch.setattr(base, "BLOCK_BYTES", 7 * 20)
    text = """
    class Breaking(Plain):
        def __getitem__(self, i):
            if i == 50 and not Path(__file__).with_name("mended").exists():
                raise OSError("no network")
            return super().__getitem__(i)

    from pathlib import Path
    """
    name = f"{write_module(tmp_path, text)}:Breaking"
    args = ["--from", name, "--out", str(tmp_path / "a"), "--shards", "3"]
    assert refused(capsys, *args).startswith(f"{name}: sample 50 cannot be read: OSError: no network (")
    (tmp_path / "mended").touch()
    assert main(["write", *args]) == 0
    assert sorted(seen()) == [0, *range(40, 60)]
    assert row_numbers(written(tmp_path / "a")) == list(range(60))


def test_what_cannot_be_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_module(tmp_path, NAMED), str(tmp_path / "out")
    assert refused(capsys, "a.npz", "--from", f"{path}:Plain", "--out", out) == (
        f"a.npz and --from {path}:Plain: expected one source. Leave one out."
    )
    assert refused(capsys, "--from", "digits", "--out", out) == (
        "--from digits: expected `file.py:make_dataset` or `package.module:make_dataset`. Name the function "
        "that makes the dataset."
    )
    assert refused(capsys, "--from", f"{path}:Patients", "--out", out) == (
        f"{path}:Patients: a sample has the fields `picture`, `animal`, `kilos`, `owner`; expected `inputs`. "
        "Name them in --inputs, --targets, --fields, or return such a field."
    )
    assert refused(
        capsys, "--from", f"{path}:Patients", "--inputs", "picture", "--targets", "owner", "--out", out
    ) == (
        f"{path}:Patients: `owner` of a sample is text; expected numbers. List the texts that are classes in "
        "--classes if it is the targets, else leave it out."
    )
    assert refused(capsys, "--from", f"{path}:Nothing", "--out", out).startswith(
        f"--from: {path} has no 'Nothing';"
    )
    assert refused(capsys, "--out", out).startswith("sources '': expected `digits`, one .npz file,")


def test_torch_is_loaded_by_the_user_alone(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("def make():\n    return [([i], i % 2) for i in range(4)]\n")
    before = sys.modules.get("torch")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        source = PythonDataset(f"{tmp_path}/plain.py:make", {"inputs": "inputs", "targets": "targets"})
        (block,) = source.blocks()
    finally:
        sys.modules.pop("torch")
        if before is not None:
            sys.modules["torch"] = before
    assert block["inputs"].tolist() == [[0], [1], [2], [3]]
