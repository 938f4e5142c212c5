"""Memory of a rank with and without `sync.ema`, beside what the table in docs/algorithm.md says. See
README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part

MIB = 1 << 20
SIDE = "EMA_MEMORY_SIDE"
FOLDER = "EMA_MEMORY_FOLDER"
FEATURES = 8
STEP = 4
"""The local step in which memory is read: after averages and evaluations."""


class Square(hvd_train.Task):
    """A square matrix of float32."""

    def __init__(self) -> None:
        self.steps = 0

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Linear(int(os.environ[SIDE]), int(os.environ[SIDE]), bias=False)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        inputs = batch["inputs"].repeat(1, int(os.environ[SIDE]) // FEATURES)
        self.steps += model.training
        if model.training and self.steps == STEP:
            (Path(os.environ[FOLDER]) / str(os.getpid())).write_text(str(own_bytes()))
        return model(inputs).square().mean(), len(inputs)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        return {"error": (0.5 * len(batch["inputs"]), len(batch["inputs"]))}


def own_bytes() -> int:
    """Of this process, without the files that it maps; what ranks share counts in parts."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(n) for n in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", text, re.M))


def measured(folder: Path, ranks: int, side: int, *sync: str) -> float:
    """Bytes of a rank in a local step, before its gradients, with these options: the mean over the ranks."""
    results = folder / f"{ranks}-{side}-{len(list(folder.iterdir()))}"
    results.mkdir()
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
    options = ["--task", f"{__file__}:Square", "--data", str(folder / "data"), "--batch-size", "4"]
    options += ["--runs", str(folder / "runs"), "--name", results.name, "--max-rounds", str(STEP)]
    options += ["--period", "1", *sync, "--evaluate.every-rounds", "1", "--patience", "0"]
    options += ["--lr", "1e-6", "--threads", "1", "--record.no-observe"]
    line = [*start, sys.executable, "-m", "hvd_train", *options]
    env = {**os.environ, SIDE: str(side), FOLDER: str(results)}
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [int(file.read_text()) for file in results.iterdir()]
    assert len(found) == ranks
    subprocess.run(["rm", "-r", str(folder / "runs" / results.name)], check=True)
    return sum(found) / ranks


def predicted(ranks: int, model: int, more: float) -> float:
    """Bytes by the table of docs/algorithm.md, for one host: live, slots, slice, and `more` slices of the
    model. Under SGD with momentum S is twice the model."""
    state = 2 * model
    return state + 2 * state / ranks + state / ranks + more * model / ranks


def facts(model: int) -> dict[str, Any]:
    """Versions and machine, for the file of results."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "model_mib": model / MIB,
    }


def noise(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part, rows in (("train", 256), ("validation", 8)):
        inputs = generator.standard_normal((rows, FEATURES), dtype=np.float32)
        write_part(folder / "data", Arrays(inputs, np.zeros(rows, np.int64)), part=part, shards=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8872, help="of the square matrix: 300 MiB")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    model, rows = 4 * options.side**2, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise(folder)
        for ranks in options.ranks:
            bare = measured(folder, ranks, FEATURES)
            for ema in (0.0, 0.99):
                row: dict[str, Any] = {"ranks": ranks, "ema": ema}
                row["predicted_mib"] = round((bare + predicted(ranks, model, 1 if ema else 0)) / MIB)
                row["measured_mib"] = round(
                    measured(folder, ranks, options.side, "--sync.ema", str(ema)) / MIB
                )
                rows.append(row)
                print(
                    f"{ranks} ranks, sync.ema {ema}: predicted {row['predicted_mib']} MiB, measured "
                    f"{row['measured_mib']} MiB per rank",
                    flush=True,
                )
    if options.json:
        Path(options.json).write_text(json.dumps({**facts(model), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
