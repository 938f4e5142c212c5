"""Tasks whose models are exported, or cannot be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train


class Plain(hvd_train.Task):
    """A classification of [B, 3] in 7 classes by one layer."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Linear(3, 7)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        wrong = model(batch["inputs"]).argmax(1) != batch["targets"]
        return {"error": (float(wrong.sum()), len(wrong))}


class Norm(Plain):
    """Norms and dropout behind a transform that has constants of its own."""

    def __init__(self) -> None:
        self.mean, self.spread = torch.tensor([100.0, 110.0, 120.0]), 70.0

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        hidden = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.LayerNorm(8)]
        return nn.Sequential(*hidden, nn.Linear(8, 7))

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "inputs": (batch["inputs"] - self.mean) / self.spread}


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.last = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.second(torch.tanh(self.first(x.reshape(len(x), -1)))))
        return outputs


class TiedAndCompiled(Plain):
    """Tied weights, in a compiled model; `len` of a tensor in its forward."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return torch.compile(_Tied(), backend="eager")  # type: ignore[return-value]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits = self.layer(values * mask)
        return {"logits": logits, "best": logits.argmax(1)}


class Two(Plain):
    """Two inputs, made by the loss, and two outputs."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return _Two()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        x = batch["inputs"]
        return F.cross_entropy(model(x / 100, x > 50)["logits"], batch["targets"]), len(x)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        return {"error": (0.0, 1.0)}


class NeedsTargets(Plain):
    """A transform whose inputs depend on the targets."""

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "inputs": batch["inputs"] / 100 + batch["targets"][:, None]}


class Branches(Plain):
    """A transform that depends on the values, which no graph can hold."""

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["inputs"]
        return {**batch, "inputs": x / 100 if x.sum() > 0 else x}


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x / 100 if x.sum() > 0 else x)
        return outputs


class Branching(Plain):
    """A model that depends on the values."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return _Branching()


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x / 100)
        return outputs + torch.rand(())


class Random(Plain):
    """A model whose outputs differ from call to call."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return _Random()


class ByName(Plain):
    """Gives the model its input by name, which a graph has no place for."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(input=batch["inputs"]), batch["targets"]), len(batch["targets"])
