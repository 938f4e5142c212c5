"""Tasks with one symptom each, for the pictures of docs/monitoring.md.

They train the built-in classification, and sleep, build a model, or read as no task of yours should.
"""

from __future__ import annotations

import time

from torch import Tensor, nn

import hvd_train
from hvd_train.config import ModelConfig
from hvd_train.data.format import Array
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.environment.launcher import detect
from hvd_train.tasks.base import Batch, Sums
from hvd_train.tasks.built_in import Classification


class SlowRank(hvd_train.Task):
    """Rank 2 takes longer for each local step."""

    def __init__(self) -> None:
        self.inner = Classification(ModelConfig(name="mlp", hidden=(500, 100)))

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return self.inner.build_model(spec)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if detect().rank == 2:
            time.sleep(0.01)
        return self.inner.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        return self.inner.evaluate(model, batch)

    def transform(self, batch: Batch) -> Batch:
        return self.inner.transform(batch)


class Muted(nn.Module):
    """A layer whose output hardly counts, and whose gradients are as small."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        quiet: Tensor = x + 0.0005 * self.linear(x)
        return quiet


class DeadLayer(SlowRank):
    """No rank is slow, and one layer does not learn."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        model = self.inner.build_model(spec)
        layers = model.get_submodule("layers")
        assert isinstance(layers, nn.Sequential)
        layers.insert(2, Muted(500))  # after the first layer and its ReLU
        return model

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self.inner.loss(model, batch)


class SlowDisk(DeadLayer):
    """All ranks read as from a file system that gives each of them 3 MB/s; all layers learn."""

    def __init__(self) -> None:
        super().__init__()
        read_into = ShardFile.read_into

        def slowly(file: ShardFile, name: str, start: int, stop: int, out: Array) -> None:
            read_into(file, name, start, stop, out)
            time.sleep(out[: stop - start].nbytes / 3e6)

        ShardFile.read_into = slowly  # type: ignore[method-assign]

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return self.inner.build_model(spec)
