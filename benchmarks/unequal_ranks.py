"""Samples/s of two ranks of which one is half as fast: rounds of a fixed number of local steps, and rounds of
equal time (`sync.schedule = "time"`). See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks.averaging_cost import ROOT, circumstances, read_run, write_data
from hvd_train.config import ModelConfig
from hvd_train.environment.launcher import detect
from hvd_train.record.events import read_events
from hvd_train.tasks.base import Batch
from hvd_train.tasks.built_in import Classification

_EXTRA = "UNEQUAL_RANKS_EXTRA"
"""Variable of the environment: the part of a batch that the slow rank computes again."""


class OneSlowRank(Classification):
    """The MNIST mlp. Rank 1 computes the gradient of some rows of every batch more often than needed."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(hidden=(500, 100)))
        self._extra = float(os.environ[_EXTRA]) if detect().rank == 1 else 0.0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        left = round(self._extra * len(batch["inputs"]))
        while left > 0:
            part = {name: values[:left] for name, values in batch.items()}
            loss, count = super().loss(model, part)
            loss.backward()
            model.zero_grad()
            left -= count
        return super().loss(model, batch)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--period", type=int, default=40, help="local steps of a round with a fixed number")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each run")
    parser.add_argument("--warm-up", type=int, default=40, help="rounds at its start that do not count")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each way, in turn")
    parser.add_argument(
        "--extra",
        type=float,
        default=1.3,
        help="gradients that the slow rank computes in addition, in batches",
    )
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    return parser.parse_args()


def train(name: str, folder: Path, given: argparse.Namespace, options: Sequence[str]) -> Path:
    """Trains in a job of its own; returns its event log."""
    words = ["--data", folder / "data", "--runs", folder / "runs", "--name", name, "--threads", "1"]
    words += ["--task", f"{Path(__file__).resolve()}:OneSlowRank", "--max-rounds", given.rounds]
    words += ["--batch-size", "64", "--patience", "0", "--evaluate.every-epochs", "0"]
    words += ["--evaluate.every-rounds", given.rounds]  # at the end only, after what is counted
    launcher = [
        f"{sys.prefix}/bin/mpirun",
        "-np",
        "2",
        "--bind-to",
        "core",
        sys.executable,
        "-m",
        "hvd_train",
    ]
    environment = {"PYTHONPATH": str(ROOT), _EXTRA: str(given.extra)}
    done = subprocess.run(
        [*launcher, *map(str, words), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: the training ended with {done.returncode}:\n{done.stdout}")
    return folder / "runs" / name / "events.jsonl"


def step_seconds(log: Path) -> list[float]:
    """Of each rank: seconds of a local step, its batch included, over all rounds."""
    events = list(read_events(log))
    busy, steps = np.zeros(2), np.zeros(2)
    for event in events:
        if event["event"] == "ranks":
            busy += np.add(event["seconds"]["data"], event["seconds"]["compute"])
        elif event["event"] == "round":
            rounds = event["rounds"][1] - event["rounds"][0] + 1
            steps += np.sum(event["steps"], 0) if "steps" in event else rounds * event["period"]
    found: list[float] = (busy / steps).tolist()
    return found


def main() -> None:
    given = arguments()
    load, runs, measurements = os.getloadavg()[0], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data", given.mnist, 2)
        fixed = ["--period", str(given.period)]
        slow_s = max(step_seconds(train("first", folder, given, fixed)))
        # Rounds as long as those of a fixed number of steps.
        seconds = round(given.period * slow_s, 4)
        ways = {"fixed": fixed, "time": ["--schedule", "time", "--sync.seconds", str(seconds)]}
        for repetition in range(given.repetitions):
            for way in sorted(ways, reverse=bool(repetition % 2)):
                log = train(f"{way}-{repetition}", folder, given, ways[way])
                found = read_run(way, repetition, log, given.warm_up)
                measurements.append(found)
                of_ranks = step_seconds(log)
                runs.append(
                    {
                        "way": way,
                        "repetition": repetition,
                        "samples_per_s": found.samples_per_s,
                        "step_ms": [1000 * s for s in of_ranks],
                        "slowdown": of_ranks[1] / of_ranks[0],
                    }
                )
                print(f"{repetition} {way}: {found.samples_per_s:,.0f} samples/s", file=sys.stderr)
    given.ranks, given.threads = 2, 1
    about = {**circumstances(given, data, load, measurements), "seconds": seconds, "extra": given.extra}
    show(about, runs)
    if given.json:
        given.json.write_text(json.dumps({"about": about, "runs": runs}, indent=2) + "\n")


def show(about: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    speeds = {way: [r["samples_per_s"] for r in runs if r["way"] == way] for way in ("fixed", "time")}
    for way, values in speeds.items():
        print(
            f"{way:<6} {statistics.median(values):>9,.0f} samples/s, {min(values):,.0f} to {max(values):,.0f}"
        )
    ratios = [time / fixed for fixed, time in zip(speeds["fixed"], speeds["time"], strict=True)]
    slowdown = statistics.median(r["slowdown"] for r in runs)
    print(
        f"time / fixed {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; the slow "
        f"rank's steps take {slowdown:.2f} times as long, so that the limit is {(1 + slowdown) / 2:.3f}"
    )


if __name__ == "__main__":
    main()
