"""A task whose model has batch norm, for whole trainings on the shards of `trainings.small`."""

from __future__ import annotations

import torch
from torch import nn

from hvd_train.data.format import SampleSpec
from tests.unit.trainings import Same


class Network(nn.Module):
    """Batch norm of the inputs themselves, so that its statistics are known, and of a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.last = nn.Linear(8, 7)
        # The ranks of a test are threads, which share torch's generator.
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():
            p.detach().normal_(0, 0.3, generator=generator)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.layers(self.first(inputs.float())))
        return logits


class Normed(Same):
    """Dropout draws from torch's generator: the same only with one rank."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        super().build_model(spec)
        return Network()


class WithoutDropout(Normed):
    """The same on any number of ranks."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        model = super().build_model(spec)
        model.get_submodule("layers.3").p = 0.0  # type: ignore[assignment]
        return model
