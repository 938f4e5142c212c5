"""Memory of the optimizer's state on a rank: `--sync gradients` beside ZeroRedundancyOptimizer of torch. See
README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_train
from benchmarks.averaging_cost import ROOT, markdown
from benchmarks.ema_memory import FEATURES, MIB, facts, noise, own_bytes

SIDE = "SHARDED_OPTIMIZER_SIDE"
FOLDER = "SHARDED_OPTIMIZER_FOLDER"
LAYERS = 12
STEP = 4
"""The local step in which memory is read: after steps of the optimizer, before gradients."""

OPTIMIZERS = {"SGD": ["--optim.args", "momentum", "0"], "AdamW": []}
"""By name: the options beside it. The first keeps nothing: what the other needs more is its state."""


def layers(side: int) -> nn.Module:
    """Square matrices of float32: ZeroRedundancyOptimizer deals whole parameters."""
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))


class Layers(hvd_train.Task):
    """A few layers."""

    def __init__(self) -> None:
        self.steps = 0

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return layers(int(os.environ[SIDE]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        self.steps += model.training
        if model.training and self.steps == STEP:
            write_bytes()
        inputs = batch["inputs"].repeat(1, int(os.environ[SIDE]) // FEATURES)
        return model(inputs).square().mean(), len(inputs)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        return {"error": (0.5 * len(batch["inputs"]), len(batch["inputs"]))}


def write_bytes() -> None:
    (Path(os.environ[FOLDER]) / str(os.getpid())).write_text(str(own_bytes()))


def measured(folder: Path, ranks: int, side: int, line: list[str]) -> list[int]:
    """Bytes of each rank of a program."""
    results = folder / f"results-{len(list(folder.iterdir()))}"
    results.mkdir()
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    env = {**os.environ, SIDE: str(side), FOLDER: str(results), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, sys.executable, *line], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [int(file.read_text()) for file in results.iterdir() if file.name.isdigit()]
    assert len(found) == ranks
    return sorted(found)


def ours(folder: Path, ranks: int, side: int, optimizer: str) -> list[int]:
    options = ["--task", f"{__file__}:Layers", "--data", str(folder / "data"), "--batch-size", "4"]
    options += ["--runs", str(folder / "runs"), "--max-rounds", str(STEP), "--period", "1"]
    options += ["--sync", "gradients", "--optim.name", optimizer, *OPTIMIZERS[optimizer], "--lr", "1e-6"]
    options += ["--checkpoint.every-rounds", "0", "--patience", "0", "--threads", "1", "--record.no-observe"]
    return measured(folder, ranks, side, ["-m", "hvd_train", *options])


def zero(folder: Path, ranks: int, side: int, optimizer: str) -> list[int]:
    return measured(folder, ranks, side, ["-m", "benchmarks.sharded_optimizer_memory", "--peer", optimizer])


def train_peer(name: str) -> None:
    """One rank with DistributedDataParallel and ZeroRedundancyOptimizer."""
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, ranks = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ[FOLDER]}/store", rank=rank, world_size=ranks
    )
    torch.set_num_threads(1)
    side = int(os.environ[SIDE])
    model = nn.parallel.DistributedDataParallel(layers(side), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), getattr(torch.optim, name), lr=1e-6, fused=True)
    for step in range(1, STEP + 1):
        optimizer.zero_grad()
        if step == STEP:
            write_bytes()
        model(torch.randn(4, side)).square().mean().backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2560, help=f"of {LAYERS} square matrices: 300 MiB")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        train_peer(options.peer)
        return
    model = 4 * LAYERS * options.side**2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise(folder)
        for ranks in options.ranks:
            for way, measure in (("hvd_train", ours), ("ZeroRedundancyOptimizer", zero)):
                without, with_state = (measure(folder, ranks, options.side, o) for o in OPTIMIZERS)
                more = [(b - a) / MIB for a, b in zip(without, with_state, strict=True)]
                row = {"ranks": ranks, "way": way, "part_mib": 2 * model / ranks / MIB, "state_mib": more}
                rows.append(row | {"whole_mib": [b / MIB for b in with_state]})
                print(row, file=sys.stderr)
    print(markdown(table(rows)))
    if options.json:
        options.json.write_text(json.dumps({**facts(model), "rows": rows}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """MiB of AdamW's state on the ranks: of one part, and measured: the mean and the largest."""
    cells = [["", "ranks", "two moments / p", "mean", "largest", "rank, all in all"]]
    for row in rows:
        figures = (row["part_mib"], sum(row["state_mib"]) / row["ranks"], max(row["state_mib"]))
        whole = sum(row["whole_mib"]) / row["ranks"]
        cells.append([row["way"], str(row["ranks"]), *(f"{mib:.0f}" for mib in (*figures, whole))])
    return cells


if __name__ == "__main__":
    main()
