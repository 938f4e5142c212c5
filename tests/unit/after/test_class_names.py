"""A model of classes with names: training, evaluation, predictions and export know them."""

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
from hvd_train.config_file import load_config, tomllib
from hvd_train.errors import UserError

NAMES = ("cat", "dog", "bird", "emu")
"""The last one never occurs."""


def write(path: Path, rows: int, first: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    numbers = np.arange(first, first + rows) % 3
    with h5py.File(path, "w") as file:
        file["inputs"] = np.random.default_rng(first).normal(size=(rows, 4)).astype("f4")
        file["inputs"][:, 0] += 3 * numbers
        file["targets"] = [names[number] for number in numbers]
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    write(folder / "a.h5", 120)
    write(folder / "b.h5", 60, 1)
    config = Config(
        name="run",
        runs=str(folder / "runs"),
        threads=1,
        data=DataConfig(path=str(folder / "a.h5"), validation=str(folder / "b.h5"), classes=NAMES),
        model=ModelConfig(hidden=(8,)),
        stop=StopConfig(max_rounds=2),
        evaluate=EvaluateConfig(every_rounds=1),
    )
    return hvd_train.train(config).run


def test_a_class_that_never_occurs_is_named(run: Path) -> None:
    (header,) = [e for e in map(json.loads, (run / "events.jsonl").open()) if e["event"] == "header"]
    assert header["remarks"] == [
        f"{run.parent.parent}/a.h5: of the 4 classes, `targets` never holds `emu`. The model has an output "
        "for each of them. Unless they are in data to come, leave them out of data.classes."
    ]


def test_the_model_has_an_output_for_each_name(run: Path) -> None:
    trained = open_trained(run)
    assert trained.saved.sample.class_names == NAMES
    assert trained.saved.sample.num_classes == 4
    assert trained.config.data.classes == NAMES
    assert load_config(run / "config.toml").data.classes == NAMES


def test_evaluate_names_the_classes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json", "--threads", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["class_names"] == list(NAMES)
    later = write(tmp_path / "c.h5", 30, 2)
    assert main(["evaluate", str(run), "--data", str(later), "--threads", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = [line[0] for line in lines if line and line[0] in NAMES]
    assert heads == [*NAMES, NAMES[0], *NAMES], "a table by class; head and rows of the confusion matrix"
    write(later, 30, 2, ("cat", "dog", "cow"))
    assert main(["evaluate", str(run), "--data", str(later), "--threads", "1"]) == 2
    assert (
        "dataset `targets` holds `cow` in row 0; expected one of data.classes: `cat`,"
        in capsys.readouterr().err
    )


def test_predict_writes_numbers_and_what_they_stand_for(run: Path, tmp_path: Path) -> None:
    data, out = write(tmp_path / "c.h5", 30), tmp_path / "out.h5"
    assert main(["predict", str(run), "--data", str(data), "--out", str(out), "--threads", "1"]) == 0
    with h5py.File(out) as file:
        assert json.loads(file.attrs["classes"]) == list(NAMES)
        assert file["class"].dtype == np.int64
        assert file["probability"].shape == (30, 4)


def test_the_card_of_an_export_has_the_names(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    (card,) = tmp_path.glob("*.toml")
    assert tomllib.loads(card.read_text())["model"]["classes"] == list(NAMES)


def test_other_classes_are_another_sample(run: Path) -> None:
    config = replace(load_config(run / "config.toml"), resume=str(run))
    other = replace(config, data=replace(config.data, classes=tuple(reversed(NAMES))))
    with pytest.raises(UserError, match=r"samples with .*cat.*; those of data\.path have .*emu"):
        hvd_train.train(replace(other, stop=StopConfig(max_rounds=3)))
