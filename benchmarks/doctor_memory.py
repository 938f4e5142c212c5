"""What doctor says that a training needs, beside the peak of that training, for four models. See README.md
beside this file."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part

ROOT = Path(__file__).resolve().parent.parent
UNITS = {"B": 1 / (1 << 20), "KiB": 1 / (1 << 10), "MiB": 1.0, "GiB": float(1 << 10)}
PERIOD_S = 0.005


class Wide(hvd_train.Task):
    """17 M parameters in three matrices."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        sides = (784, 3700, 3700, 10)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sides)]
        return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(self._inputs(batch)), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        wrong = model(self._inputs(batch)).argmax(1) != batch["targets"]
        return {"error": (float(wrong.sum()), len(wrong))}

    def _inputs(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["inputs"] / 255


class Words(Wide):
    """An embedding of 12.8 M parameters."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.EmbeddingBag(200_000, 64), nn.Linear(64, 10))

    def _inputs(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["inputs"].long()


MODELS = {
    "mlp": "[model]\nhidden = [128, 64]\n",
    "cnn": '[model]\nname = "cnn"\nchannels = [64, 128]\n',
    "wide": f'task = "{__file__}:Wide"\n',
    "words": f'task = "{__file__}:Words"\n[optim]\nname = "AdamW"\nlr = 0.001\n',
}


def configuration(folder: Path, name: str) -> Path:
    """A run of a few rounds on noise, with a checkpoint and validation."""
    head, _, sections = MODELS[name].partition("[")
    path = folder / f"{name}.toml"
    data = f'[data]\npath = "{folder / "data"}"\nbatch_size = 64\n[stop]\nmax_rounds = 2\npatience = 0\n'
    common = f'threads = 1\nruns = "{folder / "runs"}"\n{head}'
    path.write_text(f"{common}{data}[sync]\nperiod = 3\n{'[' if sections else ''}{sections}")
    return path


def line(ranks: int, *arguments: str) -> list[str]:
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
    return [*start, sys.executable, "-m", "hvd_train", *arguments]


def predicted_mib(config: Path, ranks: int) -> float:
    done = subprocess.run(
        line(ranks, "doctor", "--json", "--config", str(config)), capture_output=True, text=True, check=False
    )
    report: dict[str, Any] = json.loads(done.stdout)
    (seen,) = (check["seen"] for check in report["checks"] if check["name"] == "memory")
    found = re.search(r": ([\d.]+) (\w+) of ", seen)
    assert found, seen
    return float(found[1]) * UNITS[found[2]]


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def memory(pid: int) -> tuple[float, float] | None:
    """MiB of a rank: its own and its part of what ranks share; files that it maps. None if it is no rank."""
    try:
        if b"\0hvd_train\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return None
        if not Path(f"/proc/{pid}/exe").resolve().name.startswith("python"):
            return None
        text = Path(f"/proc/{pid}/smaps_rollup").read_text() + Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    if "RssFile" not in kib:  # it has just ended
        return None
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) / 1024, kib["RssFile"] / 1024


def measured_mib(config: Path, ranks: int) -> float:
    """The most that the ranks held at any moment, libraries counted once."""
    process = subprocess.Popen(
        line(ranks, "--config", str(config)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak = 0.0
    while process.poll() is None:
        held = [found for pid in family(process.pid) if (found := memory(pid))]
        if held:
            peak = max(peak, sum(own for own, _ in held) + max(files for _, files in held))
        time.sleep(PERIOD_S)
    assert process.stdout is not None
    output = process.stdout.read().decode()
    assert process.returncode == 0, output
    return peak


def noise(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part, rows in (("train", 8000), ("validation", 1000)):
        inputs = generator.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        arrays = Arrays(inputs, generator.integers(0, 10, rows), 1 / 255)
        write_part(folder / "data", arrays, part=part, shards=2 if part == "train" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise(folder)
        for model in options.models:
            config = configuration(folder, model)
            for ranks in options.ranks:
                said, peak = predicted_mib(config, ranks), measured_mib(config, ranks)
                rows.append(
                    {
                        "model": model,
                        "ranks": ranks,
                        "doctor_mib": said,
                        "peak_mib": round(peak),
                        "ratio": round(said / peak, 3),
                    }
                )
                print(
                    f"{model:6} {ranks} ranks: doctor {said:.0f} MiB, peak {peak:.0f} MiB, {said / peak:.2f}"
                )
    if options.json:
        facts = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
        }
        Path(options.json).write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
