"""Exports of every format are the model, whatever the task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.cli import main
from hvd_train.config import ModelConfig
from hvd_train.config_file import tomllib
from hvd_train.data.grouping import Grouping
from hvd_train.data.sources import Arrays
from hvd_train.run.model_state import unwrapped
from tests.launching import ROOT
from tests.unit.after.runs import FORMATS, of, trained

RNG = np.random.default_rng(0)
IMAGES = Arrays(RNG.integers(0, 255, (90, 6, 6), np.uint8), np.arange(90) % 5, 1 / 255)
TOKENS = Arrays(RNG.integers(0, 9, (90, 7)), np.zeros(90, np.int64))
TABLE = Arrays(RNG.random((90, 10)), RNG.random(90))
VECTORS = Arrays(RNG.random((90, 10)).astype(np.float32), RNG.random((90, 2)).astype(np.float32))
FAR = Arrays(1e9 + RNG.normal(size=(90, 10)), RNG.random((90, 2)).astype(np.float32))

CASES: dict[str, tuple[str, Arrays | None, str]] = {
    "mlp": ("classification", IMAGES, "mlp"),
    "cnn": ("classification", IMAGES, "cnn"),
    "regression": ("regression", VECTORS, "mlp"),
    "standardized cnn": ("classification", IMAGES, "cnn"),
    "standardized far from 0": ("regression", FAR, "mlp"),
    "token mlp": ("next-token", TOKENS, "mlp"),
    "token cnn": ("next-token", TOKENS, "cnn"),
    "tabular": (f"{ROOT}/examples/tabular.py:Tabular", TABLE, "mlp"),
    "norm": (of("Norm"), None, "mlp"),
    "tied and compiled": (of("TiedAndCompiled"), None, "mlp"),
    "two inputs": (of("Two"), None, "mlp"),
}

STANDARDIZED: dict[str, Grouping] = {"standardized cnn": "all", "standardized far from 0": "component"}


def inputs_for(case: str, size: int) -> tuple[tuple[Tensor, ...], Callable[[nn.Module], Any]]:
    """Inputs of an exported graph, and what the model is to give for them."""
    if case in ("mlp", "cnn", "standardized cnn"):
        x = torch.from_numpy(IMAGES.inputs[:size])
        return (x,), lambda model: model(x)
    if case.startswith("token"):
        x = torch.from_numpy(TOKENS.inputs[:size, :-1])
        return (x,), lambda model: model(x)
    if case == "standardized far from 0":
        x = torch.from_numpy(FAR.inputs[:size])
        return (x,), lambda model: model(x)
    x = torch.rand(
        size, 10 if case in ("regression", "tabular") else 3, generator=torch.Generator().manual_seed(1)
    )
    if case == "tabular":
        x = x.double()
        return (x,), lambda model: model(2 * x.float() - 1)
    if case == "norm":
        return (x,), lambda model: model((x - torch.tensor([100.0, 110.0, 120.0])) / 70)
    if case == "two inputs":
        return (x, x > 0.5), lambda model: tuple(model(x, x > 0.5).values())
    return (x,), lambda model: model(x)


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_the_model(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, arrays, name = CASES[case]
    small = ModelConfig(name=name, hidden=(8,), channels=(4,), embedding=4, context=3, dropout=0.1)  # type: ignore[arg-type]
    run = trained(tmp_path, task, arrays, small, STANDARDIZED.get(case))
    model = unwrapped(hvd_train.load_model(run))
    for form in FORMATS:
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / form)]) == 0
        said = capsys.readouterr()
        assert re.search(r"compared +\d+ samples of .+ \(validation rows\): largest difference ", said.out)
        assert said.err == ""
        card = tomllib.loads((tmp_path / f"{form}.toml").read_text())
        assert card["sha256"] == hashlib.sha256((tmp_path / form).read_bytes()).hexdigest()

        assert ("minus the mean of" in (tmp_path / f"{form}.toml").read_text()) == (case in STANDARDIZED)

    state = safetensors.torch.load_file(tmp_path / "safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())

    graph = torch.export.load(tmp_path / "torch-export").module()
    session = onnxruntime.InferenceSession(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    for size in (1, 2, 9):
        inputs, expect = inputs_for(case, size)
        with torch.no_grad():
            expected = expect(model)
            traced = graph(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        traced = tuple(traced.values()) if isinstance(traced, dict) else (traced,)
        names = [given.name for given in session.get_inputs()]
        arrays_in = {n: tensor.numpy() for n, tensor in zip(names, inputs, strict=True)}
        other = session.run(None, arrays_in)
        for a, b, c in zip(expected, traced, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.from_numpy(c), a, rtol=1e-4, atol=1e-4)
