"""What is trained: the model, its loss and its metrics. run.toml names the class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train


class MyTask(hvd_train.Task):
    """Handwritten digits, classified by a small convolutional network.

    Every rank makes its own task and calls the methods on its own batches. A method must not communicate.
    """

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        """The same on every rank: torch is seeded before. `spec` gives the names, shapes and dtypes of one
        sample's datasets, and the number of classes where the targets are classes."""
        height, width = spec.fields[spec.inputs].shape
        assert spec.num_classes is not None
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (height // 2) * (width // 2), 64),
            nn.ReLU(),
            nn.Linear(64, spec.num_classes),
        )

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Makes the batch that the other methods get from one of the shards: images of integers from 0 to 16.
        The keys are the names of the datasets. Augment here."""
        return {"inputs": batch["inputs"].float().unsqueeze(1) / 16, "targets": batch["targets"]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The mean over the samples, with its gradient, and how many there are."""
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Each metric as a sum and its divisor, so that the parts of all ranks add up to the exact mean.
        The run ends when `error` no longer falls, or the one that `evaluate.metric` names."""
        wrong = (model(batch["inputs"]).argmax(dim=1) != batch["targets"]).sum().item()
        return {"error": (wrong, len(batch["targets"]))}
