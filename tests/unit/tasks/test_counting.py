"""Weights of samples and masks of targets in the built-in tasks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train import train
from hvd_train.config import Config, DataConfig, ModelConfig, StopConfig
from hvd_train.data.format import FieldSpec, Padding, SampleSpec
from hvd_train.errors import DataError, TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.built_in import Classification, NextToken, Regression

B, T = 6, 5
WEIGHTS = torch.tensor([0.5, 2, 0, 1, 0, 3])


def spec(targets: tuple[int, ...], dtype: str, *, inputs: tuple[int, ...] = (4,), **names: str) -> SampleSpec:
    fields = {
        "inputs": FieldSpec(shape=inputs, dtype="int64" if inputs == (T,) else "float32"),
        "targets": FieldSpec(shape=targets, dtype=dtype),
        "w": FieldSpec(shape=(), dtype="float32"),
        "m": FieldSpec(shape=targets, dtype="bool"),
    }
    return SampleSpec(inputs="inputs", targets="targets", fields=fields, num_classes=3, **names)


def batch_of(kind: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    if kind == "next-token":
        tokens = torch.randint(3, (2, B, T), generator=generator)
        batch = {"inputs": tokens[0], "targets": tokens[1]}
    else:
        batch = {"inputs": torch.randn(B, 4, generator=generator)}
        classes = torch.randint(3, (B,), generator=generator)
        batch["targets"] = classes if kind == "classification" else torch.randn(B, 2, generator=generator)
    return batch | {"w": WEIGHTS, "m": torch.rand(batch["targets"].shape, generator=generator) < 0.6}


def made(kind: str, **names: str) -> tuple[Task, nn.Module]:
    config = ModelConfig(hidden=(8,), dropout=0.0)
    torch.manual_seed(1)
    if kind == "classification":
        task: Task = Classification(config, groups=("counts",))
        return task, task.build_model(spec((), "int64", **names))
    if kind == "regression":
        task = Regression(config, groups=("errors",))
        return task, task.build_model(spec((2,), "float64", **names))
    task = NextToken(config)
    return task, task.build_model(spec((T,), "int64", inputs=(T,), **names))


def losses(kind: str, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """By hand, of each target: the loss, and whether the prediction is wrong (or the absolute error)."""
    if kind == "regression":
        difference = outputs - batch["targets"]
        return difference.square(), difference.abs()
    targets = batch["targets"]
    flat = F.cross_entropy(outputs.reshape(-1, 3), targets.reshape(-1), reduction="none")
    return flat.reshape(targets.shape), (outputs.argmax(-1) != targets).float()


@pytest.mark.parametrize("kind", ["classification", "regression", "next-token"])
@pytest.mark.parametrize(("weights", "mask"), [("w", ""), ("", "m"), ("w", "m")])
def test_loss_and_error_are_those_by_hand(kind: str, weights: str, mask: str) -> None:
    task, model = made(kind, weights=weights, mask=mask)
    batch = batch_of(kind)
    of_targets, wrong = losses(kind, model(batch["inputs"]).detach(), batch)
    counts = batch["m"] if mask else torch.ones_like(batch["m"])
    w = WEIGHTS if weights else torch.ones(B)
    counts = counts & (w > 0).reshape(-1, *[1] * (counts.ndim - 1))
    per_sample, has = counts.reshape(B, -1).sum(1), counts.reshape(B, -1).any(1)
    of_samples = (of_targets * counts).reshape(B, -1).sum(1)[has] / per_sample[has]
    loss, n = task.loss(model, batch)
    assert n == int(has.sum())
    torch.testing.assert_close(loss.detach(), (of_samples * w[has]).sum() / n)
    total, divisor = task.metrics(model, batch)["error"]
    if kind == "regression":
        expected = (of_samples * w[has]).sum() / w[has].sum()
    else:
        of_tokens = w.reshape(-1, *[1] * (counts.ndim - 1)).expand(counts.shape) * counts
        expected = (wrong * of_tokens).sum() / of_tokens.sum()
    assert total / divisor == pytest.approx(expected.item(), rel=1e-6)
    sums = task.evaluate(model, batch)
    assert sums["loss"][0] / sums["loss"][1] == pytest.approx(loss.item(), rel=1e-6)
    assert sums["error"] == pytest.approx((total, divisor))


@pytest.mark.parametrize("kind", ["classification", "regression", "next-token"])
def test_weights_of_one_and_a_full_mask_change_nothing(kind: str) -> None:
    plain, model = made(kind)
    same, _ = made(kind, weights="w", mask="m")
    batch = batch_of(kind)
    batch |= {"w": torch.ones(B), "m": torch.ones_like(batch["m"])}
    torch.testing.assert_close(plain.loss(model, batch)[0], same.loss(model, batch)[0])
    assert plain.loss(model, batch)[1] == same.loss(model, batch)[1] == B
    ours, theirs = plain.metrics(model, batch), same.metrics(model, batch)
    assert list(ours) == list(theirs)
    assert all(ours[name] == pytest.approx(theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["classification", "regression", "next-token"])
def test_a_sample_of_weight_0_is_left_out(kind: str) -> None:
    """Loss, gradient and metrics are those of the others, also where its target is no number."""
    task, model = made(kind, weights="w")
    batch = batch_of(kind)
    if kind == "regression":
        batch["targets"][2] = torch.nan
    kept = {name: tensor[WEIGHTS > 0] for name, tensor in batch.items()}
    gradients = []
    for part in (batch, kept):
        model.zero_grad()
        loss, n = task.loss(model, part)
        assert n == 4
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in itertools.zip_longest(*gradients):
        torch.testing.assert_close(ours, theirs)
    values = []
    for part in (batch, kept):
        (metric,) = task.build_metrics(B).values() if kind != "next-token" else (None,)
        task.evaluate(model, part)
        values.append(metric.compute() if metric else {})
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(values[0][ours], values[1][theirs], equal_nan=True)


def test_a_batch_in_which_nothing_counts_has_a_loss_of_0_with_a_gradient() -> None:
    for kind in ("classification", "regression", "next-token"):
        task, model = made(kind, mask="m")
        batch = batch_of(kind)
        batch["m"] = torch.zeros_like(batch["m"])
        loss, n = task.loss(model, batch)
        loss.backward()
        assert (loss.item(), n) == (0, 0)
        assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in model.parameters())


def test_fields_that_are_no_weight_or_mask() -> None:
    task = Regression(ModelConfig())
    with pytest.raises(TaskError, match=r"data\.weights: `inputs` has the shape \[4\] a sample"):
        task.build_model(spec((2,), "float32", weights="inputs"))
    with pytest.raises(TaskError, match=r"data\.mask: `w` has the shape \[\] a sample; expected \[2\]"):
        task.build_model(spec((2,), "float32", mask="w"))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight: float) -> None:
    task, model = made("classification", weights="w")
    batch = batch_of("classification")
    batch["w"] = torch.full((B,), weight)
    with pytest.raises(DataError, match=r"data\.weights: `w` holds .*; expected weights of 0 or more"):
        task.loss(model, batch)


def test_a_training_with_weights_learns_what_has_weight(tmp_path: Path) -> None:
    """Half of the labels are wrong, and have weight 0."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 4)).astype("f4")
    right = (inputs[:, 0] > 0).astype("i8")
    weights = np.arange(400) % 2
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["w"] = inputs, weights
        file["y"] = np.where(weights == 1, right, 1 - right)
    data = DataConfig(
        path=str(tmp_path / "a.h5"),
        fields={"inputs": "x", "targets": "y"},
        weights="w",
        validation=0.25,
        batch_size=20,
    )
    config = Config(data=data, runs=str(tmp_path / "runs"), stop=StopConfig(max_epochs=20), threads=1)
    result = train(config)
    assert result.best < 0.1


@pytest.mark.parametrize("kind", ["regression", "next-token"])
def test_padded_targets_do_not_count(kind: str) -> None:
    """As if a mask marked the values, and with a mask both."""
    task, model = made(kind, mask="m")
    shape = (T,) if kind == "next-token" else (2,)
    dtype = "int64" if kind == "next-token" else "float64"
    inputs = (T,) if kind == "next-token" else (4,)
    batch = batch_of(kind)
    values = torch.rand(batch["targets"].shape, generator=torch.Generator().manual_seed(2)) < 0.7
    for mask in ("", "m"):
        own = spec(shape, dtype, inputs=inputs, mask=mask)
        padded = replace(own.fields["targets"], padding=Padding(length=shape[0]))
        ours = type(task)(ModelConfig(hidden=(8,)))  # type: ignore[call-arg]
        ours.build_model(replace(own, fields={**own.fields, "targets": padded}))
        expected = batch | {"m": values & batch["m"] if mask else values}
        found = batch | {"targets_mask": values}
        torch.testing.assert_close(ours.loss(model, found)[0], task.loss(model, expected)[0], rtol=0, atol=0)
        assert ours.evaluate(model, found) == task.evaluate(model, expected)
