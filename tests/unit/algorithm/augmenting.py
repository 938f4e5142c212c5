"""Tasks for the tests of worker processes, which load them from this file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.tasks.base import Batch


class Noisy(hvd_train.Task):
    """Adds noise to the inputs, and some entries of other types."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        self.width = spec.fields[spec.inputs].shape[0]
        return nn.Linear(self.width, 7)

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        if training is None:
            return batch
        noisy = batch["inputs"] + training.normal((self.width,))
        batch["targets"] += 0  # a batch is the caller's
        others = {"half": noisy.bfloat16()[:, ::2], "none": noisy[:0], "one": torch.tensor(True)}
        return {**batch, "inputs": noisy, **others}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        loss = nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"])
        return loss, len(batch["targets"])


class Global(Noisy):
    """Draws from torch's generator."""

    def transform(self, batch: Batch) -> Batch:  # type: ignore[override]
        return {**batch, "inputs": batch["inputs"] + torch.randn_like(batch["inputs"])}


class Failing(Noisy):
    """Fails on the batch with row 21, none of tensors for that with row 31; killed in the next epoch."""

    def __init__(self) -> None:
        self.failed: set[int] = set()

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        rows = {21, 31} & {int(row) for row in batch["inputs"][:, 0]} if training else set()
        if len(self.failed) == 2 and rows:
            os.kill(os.getpid(), signal.SIGKILL)
        self.failed |= rows
        if 21 in rows:
            raise ArithmeticError("row 21 is odd")
        return {**batch, "names": ["a", "b"]} if rows else batch  # type: ignore[dict-item]


class Unbuilt(Noisy):
    """Cannot be made in a worker."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        raise LookupError("no pretrained weights here")


class Endless(Noisy):
    """Says who it is, and then waits for a moment with each batch."""

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        if training is not None:
            (Path(os.environ["AUGMENTING_FOLDER"]) / str(os.getpid())).touch()
            time.sleep(0.05)
        return batch


class Flat(Noisy):
    """Of images."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        images = batch["inputs"].float() / 16
        if training is not None:
            images += training.normal((8, 8), std=0.1)
        return {**batch, "inputs": images, "targets": batch["targets"].long()}

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        wrong = model(batch["inputs"]).argmax(1) != batch["targets"]
        return {"error": (float(wrong.sum()), float(len(wrong)))}
