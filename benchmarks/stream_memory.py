"""Memory of ranks that stream shards, by how the datasets are stored. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

import hvd_train

MIB = 1 << 20
FOLDER = "STREAM_MEMORY_FOLDER"
WIDTH = 1024
"""Bytes of the inputs of a sample."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunks of rows": {"chunks": (256, WIDTH)},
    "chunks of columns": {"chunks": (1 << 16, 8)},
    "gzip, chunks of rows": {"chunks": (256, WIDTH), "compression": 1},
    "gzip, chunks of 16 MiB": {"chunks": (1 << 14, WIDTH), "compression": 1},
    "gzip, chunks of columns": {"chunks": (1 << 20, 8), "compression": 1},
}


class Watched(hvd_train.Task):
    """A linear model, and a thread that reads the memory of this process."""

    def __init__(self) -> None:
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        result = Path(os.environ[FOLDER]) / str(os.getpid())
        while True:
            now = anonymous_bytes()
            if now > self._peak:
                self._peak = now
                new = result.with_suffix(".new")
                new.write_text(str(now))
                new.replace(result)
            time.sleep(0.005)

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Linear(WIDTH, 4)

    def transform(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"inputs": batch["inputs"].float(), "targets": batch["targets"].long()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        wrong = model(batch["inputs"]).argmax(1) != batch["targets"]
        return {"error": (float(wrong.sum()), len(wrong))}


def anonymous_bytes() -> int:
    """Of this process in memory, without files that it maps."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def write(path: Path, rows: int, layout: dict[str, Any]) -> None:
    """Small numbers, in memory of a few blocks."""
    rng = np.random.default_rng(0)
    chunks = layout.get("chunks")
    step = chunks[0] if chunks else 4096
    plan = layout | ({"chunks": (min(rows, chunks[0]), chunks[1])} if chunks else {})
    block = rng.integers(0, 4, (step, WIDTH), np.uint8)
    with h5py.File(path, "w") as file:
        inputs = file.create_dataset("inputs", (rows, WIDTH), "u1", **plan)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            inputs[start:stop] = np.roll(block, start, axis=1)[: stop - start]
        file["targets"] = rng.integers(0, 4, rows, np.uint8)


def trained(folder: Path, data: Path, ranks: int, name: str) -> subprocess.CompletedProcess[str]:
    """One epoch and its evaluation."""
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    options = ["--task", f"{__file__}:Watched", "--data", str(data), "--data.reading", "stream"]
    options += ["--data.validation", "0.25", "--batch-size", "1024", "--max-epochs", "1", "--lr", "1e-4"]
    options += ["--runs", str(folder / "runs"), "--name", name, "--threads", "1", "--record.no-observe"]
    line = [*start, sys.executable, "-m", "hvd_train", *options]
    env = {**os.environ, FOLDER: str(folder / name)}
    (folder / name).mkdir()
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False)


def peak(folder: Path, data: Path, ranks: int, name: str) -> int:
    """Bytes of the rank that needs most."""
    done = trained(folder, data, ranks, name)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [int(file.read_text()) for file in (folder / name).iterdir() if not file.suffix]
    assert len(found) == ranks
    return max(found)


def repacked(folder: Path, data: Path, ranks: int) -> tuple[str, Path]:
    """The line with which the refusal of a file says to write it anew, and what it writes."""
    done = trained(folder, data, ranks, "refused")
    assert done.returncode != 0, "expected a refusal"
    found = re.search(r"`(h5repack [^`]*)`", done.stderr.replace("\n", " "))
    assert found is not None, done.stderr
    subprocess.run(shlex.split(found[1]), cwd=folder, check=True)
    return found[1], folder / "repacked.h5"


@contextmanager
def written(folder: Path, rows: int, layout: dict[str, Any]) -> Iterator[Path]:
    """A file, for as long as it is needed."""
    path = folder / "data.h5"
    write(path, rows, layout)
    yield path
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.0, help="of inputs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", help="write the result to this file")
    options = parser.parse_args()
    rows, result = int(options.gib * (1 << 30)) // WIDTH, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with written(folder, 4096, {}) as path:
            own = peak(folder, path, options.ranks, "own")
        print(f"the model's own, with 4 MiB of inputs: {own / MIB:.0f} MiB per rank", flush=True)
        for number, layout in enumerate(options.layouts):
            with written(folder, rows, LAYOUTS[layout]) as path:
                row: dict[str, Any] = {"layout": layout, "repacked_by": ""}
                data = path
                if layout == "gzip, chunks of columns":
                    row["repacked_by"], data = repacked(folder, path, options.ranks)
                row["mib"] = round((peak(folder, data, options.ranks, str(number)) - own) / MIB)
            result.append(row)
            by = f", after `{row['repacked_by']}`" if row["repacked_by"] else ""
            print(f"{layout}: {row['mib']} MiB more{by}", flush=True)
    if options.json:
        facts = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "gib": options.gib,
            "ranks": options.ranks,
            "own_mib": round(own / MIB),
            "rows": result,
        }
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
