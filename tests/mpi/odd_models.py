"""Tasks whose models are out of the ordinary. Inputs are float32 [6] a sample, targets 3 classes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train
from hvd_train.tasks.base import Batch, Sums


class Odd(hvd_train.Task):
    """Classification with the model that `make` gives."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return self.make()

    def make(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        wrong = model(batch["inputs"]).argmax(1) != batch["targets"]
        return {"error": (float(wrong.sum()), float(len(wrong)))}


def mlp(*first: nn.Module) -> nn.Sequential:
    return nn.Sequential(*first, nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class BatchNorm(Odd):
    def make(self) -> nn.Module:
        return mlp(nn.BatchNorm1d(6))


class FrozenNorm(Odd):
    """A batch norm that build_model put into evaluation mode, as fine-tuning does."""

    def make(self) -> nn.Module:
        model = mlp(nn.BatchNorm1d(6))
        model[0].eval()
        return model


class Deviation(nn.Module):
    """Divides by a standard deviation, which is not a number for one row."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.std(0) + 1)


class Standardised(Odd):
    def make(self) -> nn.Module:
        return mlp(Deviation())


class Lazy(Odd):
    def make(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


class Shared(nn.Module):
    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first, self.second, self.out = first, nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.second(self.first(x))))
        return result


class LazyTied(Odd):
    """A lazy module whose weight another one shares."""

    def make(self) -> nn.Module:
        return Shared(nn.LazyLinear(6))


class Keeper(nn.Linear):
    """Extra state: how often it was called in training, in plain values."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "names": ["a", None, 0.5]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Extra(Odd):
    def make(self) -> nn.Module:
        return Keeper()


class Fourier(nn.Module):
    """Complex parameters of both widths, a complex buffer that moves, and a sum of them that is real."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64) / 3)
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
        self.register_buffer("mean", torch.zeros(6, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean += 0.1 * (x.mean(0) * 1j - self.mean)
        return (x.to(torch.complex64) @ self.weight).abs() + (
            1 + self.phase
        ).real.float() * self.mean.imag.sum().float()


class Complex(Odd):
    def make(self) -> nn.Module:
        return Fourier()


class Reassigned(nn.Module):
    """Buffers that the model assigns anew in every step: one that is averaged, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.seen = self.seen + len(x)
        result: Tensor = self.layer(x - self.mean)
        return result


class Buffers(Odd):
    def make(self) -> nn.Module:
        return Reassigned()


class Cache(nn.Module):
    """Keeps a tensor that it first makes, or makes larger, in an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.scale) < len(x):
            self.scale = torch.linspace(0.5, 1, len(x))
        result: Tensor = self.layer(x) * self.scale[: len(x), None]
        return result


class Caching(Odd):
    def make(self) -> nn.Module:
        return Cache()


class Plain(Odd):
    def make(self) -> nn.Module:
        return mlp()


class Compiled(Odd):
    def make(self) -> nn.Module:
        return torch.compile(mlp(), backend="eager")  # type: ignore[return-value]


class PartlyCompiled(Odd):
    def make(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), torch.compile(mlp(), backend="eager"))


class Parallel(Odd):
    def make(self) -> nn.Module:
        return nn.DataParallel(mlp())


class Scripted(Odd):
    def make(self) -> nn.Module:
        return torch.jit.script(mlp())  # type: ignore[no-any-return]


class Parametrised(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.spectral_norm(model[2])
        return model


class OldWeightNorm(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        nn.utils.weight_norm(model[0])
        return model


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.none = mlp(), nn.Parameter(torch.empty(0, 3))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.none.sum()
        return result


class ZeroSize(Odd):
    def make(self) -> nn.Module:
        return Empty()


class Half(Odd):
    def make(self) -> nn.Module:
        return mlp().to(torch.bfloat16)

    def transform(self, batch: Batch) -> Batch:
        return {**batch, "inputs": batch["inputs"].bfloat16()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]).float(), batch["targets"]), len(batch["targets"])


class Image(nn.Module):
    """channels_last convolutions; what is frozen was expanded, transposed or cut, and is of unusual types."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 4, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.frozen.weight.data = self.frozen.weight.data.t()
        self.register_buffer("positions", torch.arange(6).expand(4, 6))
        self.register_buffer("mask", torch.eye(8, dtype=torch.bool)[::2])
        self.register_buffer("small", torch.ones(5).to(torch.float8_e4m3fn))
        self.register_buffer("graph", torch.eye(8).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.features(x.reshape(-1, 1, 2, 3))).flatten(1)
        result: Tensor = self.out(torch.sparse.mm(self.graph, self.frozen(features).t()).t())
        return result


class Mixed(Odd):
    def make(self) -> nn.Module:
        return Image()


class Toggled(Odd):
    """Freezes a layer for good after a while, and another for every other batch."""

    def make(self) -> nn.Module:
        self.calls = 0
        return mlp()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if model.training:
            self.calls += 1
            model.get_submodule("0").requires_grad_(self.calls < 3)
            model.get_parameter("2.bias").requires_grad_(self.calls % 2 == 0)
        return super().loss(model, batch)


class Sparse(Odd):
    def make(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))

    def transform(self, batch: Batch) -> Batch:
        return {**batch, "inputs": (batch["inputs"] * 1000).long() % 50}


class OnlySparse(Sparse):
    def make(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(50, 3, mode="sum", sparse=True))


class Unknown(nn.Module):
    """Sparse gradients that no module announces."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table, sparse=True).sum(1)


class UnknownSparse(Sparse):
    def make(self) -> nn.Module:
        return Unknown()


class QuantisedBuffer(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        model.register_buffer("w", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
        return model


class SparseBuffer(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        model.register_buffer("w", torch.eye(4).to_sparse())
        return model


class ForeignState(Odd):
    def make(self) -> nn.Module:
        class Foreign(Keeper):
            def get_extra_state(self) -> Any:
                return {"when": math.inf, "what": {1, 2}}

        return Foreign()


class Aside(nn.Module):
    """A lazy module that an evaluation does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.aside = mlp(), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + (self.aside(x) if self.training else 0)
        return result


class LazyAside(Odd):
    def make(self) -> nn.Module:
        return Aside()


class Elsewhere(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        model.register_parameter("away", nn.Parameter(torch.empty(3, device="meta"), requires_grad=False))
        return model


class SparseParameter(Odd):
    def make(self) -> nn.Module:
        model = mlp()
        model.register_parameter("matrix", nn.Parameter(torch.eye(4).to_sparse()))
        return model


class Growing(nn.Module):
    """Makes a parameter in its first forward pass, which no optimizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "shift"):
            self.shift = nn.Parameter(torch.zeros(3))
        result: Tensor = self.layer(x) + self.shift
        return result


class LateParameter(Odd):
    def make(self) -> nn.Module:
        return Growing()
