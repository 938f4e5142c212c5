"""Trains a model with batch norm, plain and compiled, on every rank of a job: see test_compiling.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import hvd_train
from hvd_train.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    SyncConfig,
)


class Normed(hvd_train.Task):
    """Batch norm writes to its statistics, which are views of the buffer that its parameters are views of."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        wrong = (model(batch["inputs"]).argmax(dim=1) != batch["targets"]).sum().item()
        return {"error": (wrong, len(batch["targets"]))}


def main(folder: Path) -> None:
    """40 and 32 rows in batches of 16: the last of an epoch has 8 on rank 0; 33 rows of validation in batches
    of 20 and 13."""
    config = Config(
        runs=str(folder / "runs"),
        threads=1,
        data=DataConfig(path=str(folder / "data" / "*.h5"), batch_size=16, validation=str(folder / "v.h5")),
        model=ModelConfig(compile=True),
        sync=SyncConfig(period=3),
        stop=StopConfig(patience=0, max_rounds=5),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=1, batch_size=20),
    )
    with hvd_train.connect() as comm:
        plain = replace(config, name="plain", model=ModelConfig())
        hvd_train.train(plain, Normed(), comm)
        hvd_train.train(replace(config, name="compiled"), Normed(), comm)
        graphs = [counters["stats"]["unique_graphs"]]
        caches = {**counters["inductor"], **counters["aot_autograd"]}
        hits = sum(n for name, n in caches.items() if name.endswith("cache_hit"))
        other = replace(
            config,
            name="resumed",
            resume=str(folder / "runs" / "compiled"),
            optim=OptimConfig(precision="bf16", accumulate=2),
            stop=StopConfig(patience=0, max_rounds=8),
        )
        hvd_train.train(other, Normed(), comm)
        graphs.append(counters["stats"]["unique_graphs"])
        seen = comm.allgather({"graphs": graphs, "hits": hits})
        if comm.rank == 0:
            print(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
