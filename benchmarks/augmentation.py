"""Training with an augmentation that costs as much as the step: in the training thread, and in one worker
process. Prints seconds of an epoch of each, and their ratio. See README.md beside this file.

One rank, one thread, and one process of `data.workers`: two cores must be free.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.tasks.base import Batch

ROWS, BATCH, SIDE, WIDTH = 2048, 64, 64, 512
REPEATS = "AUGMENTATION_REPEATS"


class OfTorch(hvd_train.Task):
    """A random shift of each image, smoothed by torch's convolution a number of times; an MLP."""

    def __init__(self) -> None:
        self.repeats = int(os.environ.get(REPEATS, "0"))

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        hidden = [nn.Linear(SIDE * SIDE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, 10))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def transform(self, batch: Batch, training: hvd_train.Draws | None) -> Batch:
        return batch if training is None else {**batch, "inputs": self.augment(batch["inputs"], training)}

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


def seconds(folder: Path, task: str, repeats: int, workers: int, epochs: int) -> float:
    """Of the rounds of a run, without those of its first epoch."""
    name = f"{task}-{repeats}-{workers}-{time.time_ns()}"
    options = ["--data", str(folder / "data"), "--runs", str(folder), "--name", name, "--threads", "1"]
    options += ["--task", f"{__file__}:{task}", "--data.workers", str(workers), "--max-epochs", str(epochs)]
    options += ["--patience", "0", "--period", "8", "--optim.lr", "0.001", "--evaluate.every-epochs", "1000"]
    subprocess.run(
        [sys.executable, "-m", "hvd_train", *options],
        check=True,
        env={**os.environ, REPEATS: str(repeats), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
    times = [(event["round"], event["time"]) for event in events if event["event"] == "round"]
    begin, end = times[len(times) // epochs], times[-1]
    return (end[1] - begin[1]) / (end[0] - begin[0]) * ROWS / BATCH / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = np.random.default_rng(0).random((ROWS, SIDE, SIDE), np.float32)
        arrays = Arrays(inputs=images, targets=np.arange(ROWS) % 10)
        write_part(folder / "data", arrays, part="train")
        for task in ("OfTorch", "OfNumpy"):
            compare(folder, task, args.epochs)


def compare(folder: Path, task: str, epochs: int) -> None:
    """Chooses the repeats with which the augmentation costs as much as the step, and measures both ways."""
    step = seconds(folder, task, 0, 0, epochs)
    repeats = 1
    while seconds(folder, task, repeats, 0, epochs) < 1.5 * step:
        repeats *= 2
    some = seconds(folder, task, repeats, 0, epochs)
    repeats = max(1, round(repeats * step / (some - step)))
    inside, outside = (seconds(folder, task, repeats, workers, epochs) for workers in (0, 1))
    print(
        f"{task}: an epoch takes {step:.3f} s without augmentation, {inside:.3f} s with it in the training "
        f"thread, {outside:.3f} s with it in a worker process: ratio {inside / outside:.2f}"
    )


if __name__ == "__main__":
    main()
