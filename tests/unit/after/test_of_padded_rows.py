"""Models of padded rows: predicted with, evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hvd_train
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.config_file import tomllib
from tests.unit.data.ragged import PACKED, padded, rows_of_lengths, write_packed, write_vlen

LENGTH = 9
RNG = np.random.default_rng(0)
ROWS = rows_of_lengths([0, 1, 2, *RNG.integers(2, LENGTH + 1, 77).tolist()])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "a.h5", "w") as file:
        write_packed(file, ROWS)
        write_vlen(file, "scaled", [0.02 * row for row in ROWS])
    with h5py.File(folder / "new.h5", "w") as file:
        write_packed(file, ROWS)
    return folder


def trained(folder: Path, task: str, data: DataConfig) -> Path:
    config = Config(
        name="r",
        runs=str(folder / "runs"),
        task=task,
        backend="solo",
        threads=1,
        data=data,
        model=ModelConfig(hidden=(8,), embedding=4, context=3),
        stop=StopConfig(patience=0, max_rounds=2),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=1),
    )
    return hvd_train.train(config).run


def predicted(run: Path, data: Path, out: Path) -> dict[str, np.ndarray]:
    assert main(["predict", str(run), "--data", str(data), "--out", str(out)]) == 0
    with h5py.File(out) as file:
        return {name: file[name][:] for name in file}


def test_next_tokens(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"tokens": PACKED}
    run = trained(
        tmp_path,
        "next-token",
        DataConfig(
            path=str(data / "a.h5"),
            fields=fields,
            inputs="tokens",
            targets="tokens",
            max_length=LENGTH,
            validation=0.2,
        ),
    )
    found = predicted(run, data / "new.h5", tmp_path / "p.h5")
    model = hvd_train.load_model(run)
    for row, token, likelihood in zip(ROWS, found["token"], found["log_likelihood"], strict=True):
        if len(row):  # as of the row alone
            with torch.no_grad():
                logits = model(torch.from_numpy(row)[None])[0]
            assert int(logits[-1].argmax()) == token
            losses = F.cross_entropy(logits[:-1], torch.from_numpy(row[1:]).long(), reduction="sum")
            assert likelihood == pytest.approx(-losses.item(), rel=1e-5, abs=1e-6)
    assert main(["evaluate", str(run), "--data", str(data / "new.h5"), "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluation["num_samples"] == len(ROWS)
    assert np.isfinite(evaluation["metrics"]["loss"])
    out = tmp_path / "m.safetensors"
    assert main(["export", str(run), "--out", str(out), "--format", "safetensors"]) == 0
    card = tomllib.loads((tmp_path / "m.safetensors.toml").read_text())
    assert card["preprocessing"]["left_out"] == [f"rows of `tokens` are padded with zeros to {LENGTH} values"]
    assert card["data"]["sample"]["fields"]["tokens"]["padding"] == {
        "length": LENGTH,
        "truncate": False,
        "marks": False,
    }


def test_quantities_for_each_position(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Targets that are padded count where they have values; to predict they are not needed."""
    run = trained(
        tmp_path,
        "regression",
        DataConfig(
            path=str(data / "a.h5"),
            inputs=PACKED,
            targets="scaled",
            max_length=LENGTH,
            standardize="all",
            validation=0.2,
        ),
    )
    found = predicted(run, data / "new.h5", tmp_path / "p.h5")["outputs"]
    inputs, marks = padded(ROWS, LENGTH)
    model = hvd_train.load_model(run)
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-6)
    assert 45 < model.state_dict()["inputs.mean"] < 56, "with the zeros of the padding it would be 30"
    assert main(["evaluate", str(run), "--data", str(data / "a.h5"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    errors = np.square(outputs - 0.02 * inputs)
    has = marks.any(axis=1)
    expected = ((errors * marks).sum(axis=1)[has] / marks.sum(axis=1)[has]).mean()
    assert metrics["error"] == pytest.approx(expected, rel=1e-5)


def test_rows_longer_than_those_of_the_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(tmp_path / "long.h5", "w") as file:
        write_packed(file, [np.arange(LENGTH + 2, dtype="i4")])
    run = trained(
        tmp_path,
        "next-token",
        DataConfig(
            path=str(data / "a.h5"),
            fields={"t": PACKED},
            inputs="t",
            targets="t",
            max_length=LENGTH,
            validation=0.2,
        ),
    )
    out = tmp_path / "p.h5"
    assert main(["predict", str(run), "--data", str(tmp_path / "long.h5"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert (
        f"long.h5: dataset `values`, by the offsets in `offsets`, has {LENGTH + 2} values in row 0; " in said
    )
