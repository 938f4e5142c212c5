"""What averaging every k steps costs in quality: the perplexity of the transformer of examples/ with 4 ranks,
beside one process that sees the same samples. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.averaging_cost import ROOT, markdown
from hvd_train.data.sources import Arrays, load_npz
from hvd_train.data.writer import write_part
from hvd_train.record.events import read_events

BATCH = 16
"""Samples of a local step on one of several ranks."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--period", type=int, default=16, help="local steps between two averages")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: no time is measured")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    return parser.parse_args()


def ways(given: argparse.Namespace) -> dict[str, dict[str, int]]:
    """By name: ranks, batch of a rank, and local steps of a round, which has as many samples in each."""
    ranks, period = given.ranks, given.period
    return {
        f"{ranks} ranks, batch {BATCH}, k = {period}": {"ranks": ranks, "batch": BATCH, "period": period},
        f"1 process, batch {ranks * BATCH}": {"ranks": 1, "batch": ranks * BATCH, "period": period},
        f"1 process, batch {BATCH}": {"ranks": 1, "batch": BATCH, "period": ranks * period},
    }


def write_data(folder: Path, samples: int, shards: int) -> None:
    """As many samples as a run uses: every run sees each of them once."""
    subprocess.run([sys.executable, ROOT / "examples" / "characters.py", "write", folder], check=True)
    text = load_npz(folder / "train.npz")
    rows = np.random.default_rng(0).permutation(len(text.inputs))[:samples]
    train = Arrays(inputs=text.inputs[rows], targets=text.targets[rows])
    write_part(folder / "shards", train, part="train", shards=shards)
    write_part(folder / "shards", load_npz(folder / "validation.npz"), part="validation")


def run_once(folder: Path, name: str, seed: int, given: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Trains in a job of its own; the figures of its only evaluation, which is at its end."""
    way = ways(given)[name]
    run = f"{list(ways(given)).index(name)}-{seed}"
    options = {
        "--config": ROOT / "examples" / "transformer.toml",
        "--task": f"{ROOT}/examples/characters.py:Characters",
        "--data": folder / "shards",
        "--runs": folder / "runs",
        "--name": run,
        "--seed": seed,
        "--batch-size": way["batch"],
        "--period": way["period"],
        "--threads": 1,
        "--max-rounds": given.rounds,
        "--evaluate.every-rounds": given.rounds,
        "--learning-rate.warmup": samples // 12,
        "--learning-rate.total": samples,
    }
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(way["ranks"]), sys.executable]
    program = ["-m", "hvd_train", *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: the training ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    events = list(read_events(folder / "runs" / run / "events.jsonl"))
    (header,) = (e for e in events if e["event"] == "header")
    (last,) = (e for e in events if e["event"] == "evaluation")
    assert last["samples"] == samples, "the runs are compared at the same number of samples"
    loss = last["metrics"]["loss"]
    print(f"{name}, seed {seed}: {math.exp(loss):.3f}", file=sys.stderr)
    measured = {"way": name, "seed": seed, "steps": given.rounds * way["period"], "samples": last["samples"]}
    figures = {"loss": loss, "perplexity": math.exp(loss), "error": last["metrics"]["error"]}
    return measured | figures | {"header": header}


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of cells: the perplexity of every seed, and the mean of each way beside that of the first."""
    seeds = sorted({run["seed"] for run in runs})
    rows = [["", "steps", *(f"seed {seed}" for seed in seeds), "mean", "over the first"]]
    first = 0.0
    for way in dict.fromkeys(run["way"] for run in runs):
        mine = sorted((run for run in runs if run["way"] == way), key=lambda run: run["seed"])
        mean = statistics.mean(run["perplexity"] for run in mine)
        first = first or mean
        each = [f"{run['perplexity']:.2f}" for run in mine]
        rows.append([way, str(mine[0]["steps"]), *each, f"{mean:.2f}", f"{mean / first:.3f}"])
    return rows


def main() -> None:
    given = arguments()
    samples = given.ranks * BATCH * given.period * given.rounds
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), samples, given.ranks)
        with ThreadPoolExecutor(given.jobs) as pool:
            started = [
                pool.submit(run_once, Path(name), way, seed, given, samples)
                for way in ways(given)
                for seed in given.seeds
            ]
            runs = [run.result() for run in started]
    about = circumstances(runs[0]["header"], samples)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(markdown(table(runs)))
    if given.json:
        measured = [{key: value for key, value in run.items() if key != "header"} for run in runs]
        given.json.write_text(json.dumps({"about": about, "runs": measured}, indent=2) + "\n")


def circumstances(header: dict[str, Any], samples: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.platform(),
        "versions": {key: header["versions"][key] for key in ("hvd_train", "python", "torch", "mpi")},
        "parameters": header["num_parameters"],
        "samples": samples,
        "characters_per_sample": 64,
        "validation_samples": header["validation_samples"],
        "threads_of_a_rank": 1,
    }


if __name__ == "__main__":
    main()
