"""Runs on Python datasets: how they end and go on, and what is done with their models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import hvd_train
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.data.python.registry import made_of
from hvd_train.errors import UserError
from tests.mpi.jobs import events, model_bytes
from tests.unit.data.python_datasets import seen, write_module
from tests.unit.data.shards import write_foreign


def config(folder: Path, task: str = "classification", rounds: int = 2, **data: Any) -> Config:
    return Config(
        name="r",
        runs=str(folder / "runs"),
        task=task,
        backend="solo",
        threads=1,
        data=DataConfig(batch_size=8, **data),
        model=ModelConfig(hidden=(8,)),
        stop=StopConfig(patience=0, max_rounds=rounds),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=1),
    )


def evaluated(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("reading", ["memory", "stream"])
@pytest.mark.parametrize("dataset", ["Plain", "generated"])
def test_evaluated_and_used_for_predictions(
    dataset: str, reading: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on the same rows in a file."""
    name = f"{write_module(tmp_path)}:{dataset}"
    run = hvd_train.train(config(tmp_path, path=name, validation=0.25, reading=reading)).run
    write_foreign(tmp_path / "same.h5", 60)
    assert evaluated(capsys, str(run))["num_samples"] == 15
    of_dataset, of_file = (
        evaluated(capsys, str(run), "--data", d) for d in (name, str(tmp_path / "same.h5"))
    )
    assert of_dataset["metrics"] == of_file["metrics"]
    assert of_dataset["worst"][0]["shard"] == name
    tables = []
    for number, data in enumerate((name, str(tmp_path / "same.h5"))):
        out = tmp_path / f"{number}.h5"
        assert main(["predict", str(run), "--data", data, "--out", str(out)]) == 0
        with h5py.File(out) as file:
            assert file.attrs["data"] == data
            tables.append({key: file[key][()] for key in file})
    np.testing.assert_equal(*tables)
    assert main(["export", str(run), "--out", str(tmp_path / "exported"), "--format", "safetensors"]) == 0


@pytest.mark.parametrize("dataset", ["Known", "Streamed"])
def test_a_run_that_goes_on_is_the_same_as_one_that_was_not_interrupted(dataset: str, tmp_path: Path) -> None:
    """In the middle of an epoch, as a stream and from memory."""
    name = f"{write_module(tmp_path)}:{dataset}"
    for reading in ("memory", "stream"):
        folder = tmp_path / reading
        whole = hvd_train.train(config(folder / "whole", path=name, reading=reading, rounds=3)).run
        hvd_train.train(config(folder / "cut", path=name, reading=reading, rounds=2))
        assert main(["--resume", str(folder / "cut" / "runs" / "r"), "--stop.max-rounds", "3"]) == 0
        assert model_bytes(folder / "cut" / "runs" / "r") == model_bytes(whole)


def test_a_dataset_of_another_length_begins_its_epoch_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{write_module(tmp_path)}:Known"
    run = hvd_train.train(config(tmp_path, path=name)).run
    write_module(tmp_path, "Known.rows = 70")
    capsys.readouterr()
    assert main(["--resume", str(run), "--stop.max-rounds", "3"]) == 0
    assert "(other data, number of ranks, batch size, seed, reading or order): epoch 3 begins anew." in (
        capsys.readouterr().err
    )
    assert [e["samples_per_rank"] for e in events(run, "header")] == [[60], [70]]


def test_a_quantity_is_not_read_for_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the survey, which reads all of these few samples, the training alone reads them."""
    name = f"{write_module(tmp_path)}:Plain"
    hvd_train.train(config(tmp_path, "regression", path=name))
    assert made_of(name) is None, "it is dropped at the end of a run"
    assert len(seen()) == 1 + 60 + 60, "the first, the survey, the training"
    assert "to count the classes" not in capsys.readouterr().err


def test_standardized_and_scaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
    class Bytes(Plain):
        def __getitem__(self, i):
            return np.full(3, 4 * i, np.uint8), i % 7
    """
    path = write_module(tmp_path, text)
    hvd_train.train(config(tmp_path / "a", path=f"{path}:Bytes", scale="auto"))
    assert "data.scale = 'auto': `inputs` is multiplied by 0.00392157 (1/255)." in capsys.readouterr().err
    run = hvd_train.train(config(tmp_path / "b", path=f"{path}:generated", standardize="component")).run
    model = hvd_train.load_model(run)
    buffers = dict(model.named_buffers())
    (mean,) = (value for key, value in buffers.items() if key.endswith("mean"))
    np.testing.assert_allclose(mean, [29.5, 29.75, 30.0])


FAILING = """
class Failing(Known):
    def __getitem__(self, i):
        if i in (3, 50):
            raise OSError("gone")
        return super().__getitem__(i)
"""


def test_samples_that_fail_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{write_module(tmp_path, FAILING)}:Failing"
    run = hvd_train.train(config(tmp_path, path=name, on_damage="skip")).run
    found = capsys.readouterr()
    assert f"{name}: sample 3 cannot be read: OSError: gone (" in found.err + found.out
    assert "Left out of training: rows 3, 50." in found.err + found.out
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", name]) == 2
    assert capsys.readouterr().err.startswith(f"hvd_train: {name}: sample 3 cannot be read: OSError: gone (")
    with pytest.raises(UserError) as error:
        hvd_train.train(config(tmp_path / "again", path=name))
    assert str(error.value).startswith(f"{name}: sample 3 cannot be read: OSError: gone (")
    assert not (tmp_path / "again" / "runs" / "r").exists()


def test_the_configuration_of_a_run_names_the_file_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = hvd_train.train(config(tmp_path, path="mine.py:Known")).run
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["--resume", str(run), "--stop.max-rounds", "3"]) == 0
    assert events(run, "stop")[-1]["round"] == 3
