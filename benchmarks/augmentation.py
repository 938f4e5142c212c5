"""Training with an augmentation that costs as much as the step: in the training thread, and in one worker
process. See README.md beside this file.

One rank with one thread, and one process of `data.workers`: two cores must be free.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.tasks.base import Batch

ROWS, BATCH, SIDE, WIDTH = 2048, 64, 64, 512
REPEATS, CLOCKS = "AUGMENTATION_REPEATS", "AUGMENTATION_CLOCKS"


class Times(NamedTuple):
    """Of an epoch, in seconds."""

    wall: float

    cpu: float
    """Of the process that needs most."""


class OfTorch(hvd_train.Task):
    """A random shift of each image, smoothed by torch's convolution a number of times; an MLP."""

    def __init__(self) -> None:
        self.repeats = int(os.environ.get(REPEATS, "0"))
        self.in_worker = "hvd_train.wiring" not in sys.modules
        self.clocks: list[tuple[float, float]] = []
        atexit.register(self.write_clocks)

    def write_clocks(self) -> None:
        (Path(os.environ[CLOCKS]) / f"{os.getpid()}.json").write_text(json.dumps(self.clocks))

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        hidden = [nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, 10))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        self.read_clocks()
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def read_clocks(self) -> None:
        self.clocks.append((time.perf_counter(), time.process_time()))

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        if training is None:
            return batch
        if self.in_worker:
            self.read_clocks()
        return {**batch, "inputs": self.augment(batch["inputs"], training)}

    def augment(self, images: Tensor, training: hvd_train.Draws) -> Tensor:
        images = images + training.uniform((1, 1), -0.1, 0.1)
        for _ in range(self.repeats):
            images = nn.functional.avg_pool2d(images[:, None], 3, 1, 1)[:, 0]
        return images


class OfNumpy(OfTorch):
    """The same with numpy, and a loop over the images."""

    def augment(self, images: Tensor, training: hvd_train.Draws) -> Tensor:
        shifts = training.uniform((), -0.1, 0.1).tolist()
        return torch.from_numpy(
            np.stack([self.smooth(image.numpy() + s) for image, s in zip(images, shifts, strict=True)])
        )

    def smooth(self, image: np.ndarray) -> np.ndarray:
        for _ in range(self.repeats):
            image = (
                image + np.roll(image, 1, 0) + np.roll(image, -1, 1) + np.roll(image, 1, 1)
            ) / np.float32(4)
        return image


def measure(folder: Path, task: str, repeats: int, workers: int, epochs: int) -> Times:
    """A run, without its first epoch."""
    clocks = folder / f"{task}-{repeats}-{workers}-{time.time_ns()}"
    clocks.mkdir()
    options = ["--data", str(folder / "data"), "--runs", str(folder / "runs"), "--name", clocks.name]
    options += ["--task", f"{__file__}:{task}", "--data.workers", str(workers), "--threads", "1"]
    options += ["--max-epochs", str(epochs), "--patience", "0", "--optim.lr", "0.001"]
    subprocess.run(
        [sys.executable, "-m", "hvd_train", *options],
        check=True,
        env={**os.environ, REPEATS: str(repeats), CLOCKS: str(clocks)},
        stdout=subprocess.DEVNULL,
    )
    steps = ROWS // BATCH
    read = [json.loads(file.read_text()) for file in clocks.iterdir()]
    spent = [np.subtract(times[-1], times[steps]) / (len(times) - 1 - steps) * steps for times in read]
    return Times(*(float(max(values)) for values in zip(*spent, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6, help="of each run; the first is not measured")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": str(torch.__version__)}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = np.random.default_rng(0).random((ROWS, SIDE, SIDE), np.float32)
        arrays = Arrays(inputs=images, targets=np.arange(ROWS) % 10)
        write_part(folder / "data", arrays, part="train")
        found = [compare(folder, task, args.epochs) for task in ("OfTorch", "OfNumpy")]
    if args.json:
        args.json.write_text(json.dumps({"about": about, "runs": found}, indent=2) + "\n")


def compare(folder: Path, task: str, epochs: int) -> dict[str, Any]:
    """Chooses the repeats with which the augmentation costs as much as the step, and measures both ways."""
    step = measure(folder, task, 0, 0, epochs)
    repeats, some = 1, measure(folder, task, 1, 0, epochs)
    while some.cpu < 1.5 * step.cpu:
        repeats *= 2
        some = measure(folder, task, repeats, 0, epochs)
    repeats = max(1, round(repeats * step.cpu / (some.cpu - step.cpu)))
    inside, outside = (measure(folder, task, repeats, workers, epochs) for workers in (0, 1))
    print(f"{task}: an epoch without augmentation {step.wall:.3f} s, CPU {step.cpu:.3f} s")
    for where, times in (("training thread", inside), ("worker process", outside)):
        print(f"    in the {where}: {times.wall:.3f} s, CPU of the busiest process {times.cpu:.3f} s")
    ratio, of_cpu = inside.wall / outside.wall, inside.cpu / outside.cpu
    print(f"    ratio {ratio:.2f}; by CPU time {of_cpu:.2f}")
    parts = {"step": step, "training thread": inside, "worker process": outside}
    figures = {name: times._asdict() for name, times in parts.items()}
    return {"augmentation": task, "repeats": repeats, **figures, "ratio": ratio, "ratio_of_cpu": of_cpu}


if __name__ == "__main__":
    main()
