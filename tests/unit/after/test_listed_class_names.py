"""Classes that `shard write` has names for: training, evaluation, predictions and export know them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import hvd_train
from hvd_train.after.trained import open_trained
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.config_file import tomllib
from hvd_train.data.catalog import open_catalog
from hvd_train.errors import DataError, UserError

NAMES = ("cat", "dog", "bird", "emu")
"""The last one never occurs."""


def write(folder: Path, name: str, names: tuple[str, ...] = NAMES, *options: str, rows: int = 120) -> str:
    """Shards from a CSV file whose column `kind` has three of the names."""
    rng = np.random.default_rng(rows)
    lines = [f"{rng.normal() + 3 * (i % 3):.3f},{rng.normal():.3f},{NAMES[i % 3]}" for i in range(rows)]
    path = folder / f"{name}.csv"
    path.write_text("a,b,kind\n" + "\n".join(lines) + "\n")
    classes = ["--targets", "kind", "--classes", *names]
    assert main(["shard", "write", str(path), "--out", str(folder / name), *classes, *options]) == 0
    return str(folder / name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    config = Config(
        name="run",
        runs=str(folder / "runs"),
        threads=1,
        data=DataConfig(path=write(folder, "data", NAMES, "--split", "validation=0.25")),
        model=ModelConfig(hidden=(8,)),
        stop=StopConfig(max_rounds=2),
        evaluate=EvaluateConfig(every_rounds=1),
    )
    return hvd_train.train(config).run


def test_the_model_has_an_output_for_each_name(run: Path) -> None:
    trained = open_trained(run)
    assert trained.saved.sample.class_names == NAMES
    assert trained.saved.sample.num_classes == 4


def test_evaluate_names_the_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json", "--threads", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["class_names"] == list(NAMES)
    later = write(tmp_path, "later", NAMES[:3], rows=30)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", later, "--threads", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = [line[0] for line in lines if line and line[0] in NAMES]
    assert heads == [*NAMES, NAMES[0], *NAMES], "a table by class; head and rows of the confusion matrix"


def test_other_names_for_the_same_numbers_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path, "other", ("dog", "cat", "bird"), rows=30)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", other, "--threads", "1"]) == 2
    assert capsys.readouterr().err == (
        f"hvd_train: {other}/manifest.json: the classes are `dog`, `cat`, `bird`; the model was trained on "
        "`cat`, `dog`, `bird`, `emu`. Expected the same names for the same numbers: write the shards again, "
        "with --classes and all names in one order.\n"
    )
    again = write(tmp_path, "other", ("cat", "dog", "bird"), "--force", rows=30)
    assert main(["evaluate", str(run), "--data", again, "--threads", "1"]) == 0


def test_predict_writes_what_the_numbers_stand_for(run: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path, "new", rows=30), tmp_path / "out.h5"
    assert main(["predict", str(run), "--data", data, "--out", str(out), "--threads", "1"]) == 0
    with h5py.File(out) as file:
        assert json.loads(file.attrs["classes"]) == list(NAMES)
        assert file["probability"].shape == (30, 4)


def test_the_card_of_an_export_has_the_names(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    (card,) = tmp_path.glob("*.toml")
    assert tomllib.loads(card.read_text())["model"]["classes"] == list(NAMES)


def test_a_run_does_not_go_on_with_other_names(run: Path, tmp_path: Path) -> None:
    config = replace(open_trained(run).config, resume=str(run), stop=StopConfig(max_rounds=3))
    other = replace(
        config.data, path=write(tmp_path, "other", ("dog", "cat", "bird", "emu")), validation=0.25
    )
    with pytest.raises(
        UserError, match=r"samples with names \('cat', .*those of data\.path have names \('dog'"
    ):
        hvd_train.train(replace(config, data=other))


def test_a_run_without_names_goes_on_with_names(run: Path, tmp_path: Path) -> None:
    config, folder = open_trained(run).config, write(tmp_path, "data", NAMES[:3])
    data = replace(config.data, path=folder, validation=0.25)
    manifest = Path(folder, "manifest.json").rename(tmp_path / "manifest.json")
    unnamed = replace(config, data=data, runs=str(tmp_path / "runs"), name="unnamed")
    first = hvd_train.train(unnamed).run
    assert open_trained(first).saved.sample.class_names == ()
    manifest.rename(Path(folder, "manifest.json"))
    named = replace(unnamed, resume=str(first), stop=StopConfig(max_rounds=3))
    assert open_trained(hvd_train.train(named).run, "latest").saved.sample.class_names == NAMES[:3]


def test_names_of_two_folders_are_those_of_both(tmp_path: Path) -> None:
    train, more = write(tmp_path, "train", NAMES[:3]), write(tmp_path, "more", rows=60)
    sample = open_catalog(DataConfig(path=train, validation=more)).sample
    assert (sample.class_names, sample.num_classes) == (NAMES, 4)
    other = write(tmp_path, "other", ("dog", "cat", "bird"), rows=30)
    with pytest.raises(DataError, match=rf"{other}/manifest\.json: the classes are `dog`, .*; in {train}/"):
        open_catalog(DataConfig(path=train, validation=other))


def test_names_that_say_nothing_of_the_targets(tmp_path: Path) -> None:
    """Of another dataset, or of a file that is named without its manifest."""
    np.savez(tmp_path / "a.npz", inputs=np.ones((8, 2)), targets=np.arange(8) % 2, other=np.arange(8) % 2)
    options = ["--fields", "other", "other", "--classes", "no", "yes", "--out", str(tmp_path / "d")]
    assert main(["shard", "write", str(tmp_path / "a.npz"), *options]) == 0
    data = DataConfig(path=str(tmp_path / "d"))
    assert open_catalog(data).sample.class_names == ("no", "yes")
    assert open_catalog(replace(data, targets="other")).sample.class_names == ()
    assert open_catalog(replace(data, classes=("1", "0"))).sample.class_names == ("1", "0")
    assert open_catalog(replace(data, path=str(tmp_path / "d/*.h5"))).sample.class_names == ()


def test_shards_of_shards_keep_the_names(tmp_path: Path) -> None:
    data = write(tmp_path, "data")
    assert main(["shard", "write", data, "--out", str(tmp_path / "two"), "--shards", "2"]) == 0
    assert open_catalog(DataConfig(path=str(tmp_path / "two"))).sample.class_names == NAMES


def test_a_class_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((8, 2)), targets=np.arange(8) % 3, real=np.ones(8))
    options = ["--classes", "no", "yes", "--out", str(tmp_path / "d")]
    assert main(["shard", "write", str(tmp_path / "a.npz"), *options]) == 2
    assert capsys.readouterr().err == (
        "hvd_train: `targets` holds 2, but 2 names of classes were given. Expected class numbers from 0 to "
        "1: name every class.\n"
    )
    assert not (tmp_path / "d").exists()
    assert main(["shard", "write", str(tmp_path / "a.npz"), "--targets", "real", *options]) == 2
    assert "--classes: targets are float64 []. Expected one class number" in capsys.readouterr().err
    writer = hvd_train.ShardWriter(tmp_path / "e", class_names=("no",))
    writer.append({"inputs": np.ones(2), "targets": 2})
    with pytest.raises(DataError, match="`targets` holds 2, but 1 name of classes were given"):
        writer.close()


def test_names_that_are_too_few_in_a_manifest_of_an_earlier_version(tmp_path: Path) -> None:
    from hvd_train.data.manifest import load_manifest, save_manifest

    data = write(tmp_path, "data")
    manifest = load_manifest(data)
    assert manifest is not None
    save_manifest(data, replace(manifest, class_names=("cat", "dog")))
    catalog = open_catalog(DataConfig(path=data))
    assert (catalog.sample.class_names, catalog.sample.num_classes) == ((), 3)
    assert catalog.warnings == (
        f"{data}/train-00000-of-00001.h5: `targets` holds 2, but 2 classes have names, by manifest.json "
        "or the attribute `classes` of a dataset: they are not used. Give each class a name.",
    )
