"""Shapes, causality, preparation of raw samples and reproducible initialisation of the built-in models."""

from __future__ import annotations

import pytest
import torch

from hvd_train.config import ModelConfig
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import TaskError
from hvd_train.tasks.models import build_model, build_sequence_model, describe


def spec(shape: tuple[int, ...], dtype: str = "float32", scale: float = 1.0) -> SampleSpec:
    fields = {"x": FieldSpec(shape=shape, dtype=dtype), "y": FieldSpec(shape=(), dtype="int64")}
    return SampleSpec(inputs="x", targets="y", fields=fields, num_classes=10, scale=scale)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8, 8), (2, 5, 3)])
def test_mlp_takes_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    model = build_model(ModelConfig(hidden=(6, 4), dropout=0.25), spec(shape), 10)
    outputs = model(noise(3, *shape))
    assert outputs.shape == (3, 10)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shape", [(28, 28), (3, 9, 7), (1, 1, 5), (2, 3)])
def test_cnn_takes_images_with_and_without_channels(shape: tuple[int, ...]) -> None:
    config = ModelConfig(name="cnn", hidden=(8,), channels=(4, 6, 5), dropout=0.25)
    model = build_model(config, spec(shape), 10)
    outputs = model(noise(3, *shape))
    assert outputs.shape == (3, 10)
    outputs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cnn_refuses_inputs_that_are_not_images() -> None:
    config = ModelConfig(name="cnn")
    with pytest.raises(
        TaskError, match=r"`x` has the shape \[64\] a sample; expected images \[height, width\]"
    ):
        build_model(config, spec((64,)), 10)
    with pytest.raises(TaskError, match=r"\[28, 28, 3\] a sample, which looks like channels last"):
        build_model(config, spec((28, 28, 3)), 10)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_raw_integers_are_scaled_and_other_floats_follow_the_parameters(name: str) -> None:
    model = build_model(ModelConfig(name=name, channels=(4,)), spec((8, 8), "uint8", 1 / 16), 10)
    raw = (noise(3, 8, 8) * 16).to(torch.uint8)
    expected = model(raw.float() / 16)
    torch.testing.assert_close(model(raw), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(raw.double() / 16), expected, rtol=0, atol=0)
    double = model.double()
    assert double(raw).dtype == torch.float64
    torch.testing.assert_close(double(raw), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_sequence_models_are_causal(name: str) -> None:
    config = ModelConfig(name=name, hidden=(16,), channels=(6, 7), embedding=5, context=4)
    model = build_sequence_model(config, vocabulary=11)
    text = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(6))
    before = model(text)
    assert before.shape == (2, 20, 11)
    changed = text.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    after = model(changed.to(torch.uint8))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])
    reach = {"mlp": 4, "cnn": 7}[name]  # cnn: 1 + 2 * (1 + 2) tokens back
    assert not torch.equal(before[:, 6 + reach], after[:, 6 + reach])
    torch.testing.assert_close(before[:, 7 + reach :], after[:, 7 + reach :], rtol=0, atol=0)


def test_a_window_knows_its_order() -> None:
    model = build_sequence_model(ModelConfig(embedding=3, context=2, hidden=(8,)), vocabulary=4)
    logits = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert not torch.allclose(logits[0, 1], logits[1, 1])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_one_seed_gives_one_model(name: str) -> None:
    def parameters(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        config = ModelConfig(name=name, channels=(4,))
        models = build_model(config, spec((8, 8)), 10), build_sequence_model(config, 9)
        return [p for model in models for p in model.parameters()]

    first, again, other = parameters(1), parameters(1), parameters(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_descriptions() -> None:
    image = spec((8, 8))
    assert describe(build_model(ModelConfig(), image, 10)) == "mlp 64-128-64-10"
    assert (
        describe(build_model(ModelConfig(name="cnn", channels=(4, 6)), image, 10)) == "cnn 4-6 | 24-128-64-10"
    )
    assert describe(build_sequence_model(ModelConfig(), 50)) == "mlp 8 tokens x 32 | 256-128-64-50"
    assert describe(build_sequence_model(ModelConfig(name="cnn"), 50)) == "cnn 32-32-64 | 64-128-64-50"
    assert describe(torch.nn.Linear(2, 2)) == "Linear"
