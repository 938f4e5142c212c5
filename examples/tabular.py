"""A task of your own: regression on a table with outliers among the targets."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train


class Tabular(hvd_train.Task):
    """Huber's loss, which outliers hardly affect; the mean squared and the mean absolute error."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        (columns,) = spec.fields[spec.inputs].shape
        hidden = [nn.Linear(columns, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(64, 1), nn.Flatten(0))

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {name: values.float() for name, values in batch.items()}  # in `predict` without targets
        return {**batch, "inputs": 2 * batch["inputs"] - 1}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.huber_loss(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        off = (model(batch["inputs"]) - batch["targets"]).abs()
        n = len(off)
        return {"error": (off.square().sum().item(), n), "mae": (off.sum().item(), n)}


def table(rows: int, wrong: float, seed: int) -> dict[str, np.ndarray]:
    """Ten columns, of which five matter (J. H. Friedman, "Multivariate Adaptive Regression Splines", 1991),
    with noise of variance 1; a share `wrong` of the targets has an error of 30 on average on top."""
    rng = np.random.default_rng(seed)
    x = rng.random((rows, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y += rng.normal(size=rows) + (rng.random(rows) < wrong) * rng.exponential(30, rows)
    return {"inputs": x, "targets": y}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    np.savez(folder / "train.npz", **table(20_000, wrong=0.05, seed=1))
    np.savez(folder / "validation.npz", **table(4_000, wrong=0.0, seed=2))
