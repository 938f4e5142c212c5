"""A task for the tests: the built-in classification on ranks that stumble, fail, or disagree."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.config import ModelConfig
from hvd_train.environment.launcher import detect
from hvd_train.tasks.base import Batch, Sums
from hvd_train.tasks.built_in import Classification


class Wrapped(hvd_train.Task):
    """Classification, with something before each batch."""

    def __init__(self) -> None:
        self.inner = Classification(ModelConfig())
        self.rank = detect().rank
        self.batches = 0

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return self.inner.build_model(spec)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        self.batches += 1
        self.before_batch()
        return self.inner.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        return self.inner.evaluate(model, batch)

    def transform(self, batch: Batch) -> Batch:
        return self.inner.transform(batch)

    def before_batch(self) -> None:
        """Happens once a training batch."""


class Steady(Wrapped):
    """Nothing happens."""


class Sleepy(Wrapped):
    """Each rank sleeps at random, otherwise in every process."""

    def before_batch(self) -> None:
        time.sleep(random.SystemRandom().random() * 0.01)


class Failing(Wrapped):
    """Rank 1 raises in round 3 (k = 10)."""

    def before_batch(self) -> None:
        if self.rank == 1 and self.batches == 25:
            raise RuntimeError(f"the disk of rank 1 is on fire at {time.time()}")


class Poisoned(Wrapped):
    """Ranks listed in SICK_RANKS give a loss that is not a number in round 3."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        mean, count = super().loss(model, batch)
        sick = str(self.rank) in os.environ["SICK_RANKS"].split(",")
        return (mean * float("nan"), count) if sick and 20 < self.batches <= 30 else (mean, count)


class Uneven(Wrapped):
    """Another model on rank 1."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        if self.rank == 1:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Slow(Wrapped):
    """Long enough to be interrupted."""

    def before_batch(self) -> None:
        time.sleep(0.02)


class Straggling(Wrapped):
    """Rank 2 is slow."""

    def before_batch(self) -> None:
        time.sleep(0.06 if self.rank == 2 else 0.001)


class Patient(Wrapped):
    """Long enough to be interrupted, until there is a file `hurry` in the folder where it was started."""

    def before_batch(self) -> None:
        if not Path("hurry").exists():
            time.sleep(0.03)


class Dropout(Wrapped):
    """A model that draws random numbers while it trains."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        model = self.inner.build_model(spec)
        return nn.Sequential(model, nn.Dropout(0.2))


torch.set_num_threads(1)
