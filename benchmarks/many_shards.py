"""What many small shards cost at the start: seconds from the launch to the end of the first round.

    python benchmarks/many_shards.py [--shards 10000] [--ranks 16]

Makes `--shards` foreign files of `--rows` rows in a temporary folder, the same files with an index
(`hvd_train shard index`), and one file a rank of as many rows together. Trains on each for one round, in
turns. Prints the times, the ratio of many to few, and the limit: 1.5 times the start on few files, plus 10
seconds. Beside each time are the processor seconds of all ranks, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

WIDTH = 64


def write(path: Path, rows: int, first: int) -> None:
    """One file: inputs float32 [rows, 64] and targets int64 of ten classes."""
    rng = np.random.default_rng(first)
    with h5py.File(path, "w", libver="latest") as file:
        file["inputs"] = rng.normal(size=(rows, WIDTH)).astype("f4")
        file["targets"] = np.arange(first, first + rows) % 10


def write_all(folder: Path, shards: int, rows: int) -> Path:
    """A folder with so many files."""
    folder.mkdir()
    for shard in range(shards):
        write(folder / f"{shard:06}.h5", rows, shard * rows)
    return folder


def with_index(many: Path) -> Path:
    """The same files in another folder, with their index."""
    folder = many.with_name("indexed")
    folder.mkdir()
    for path in many.iterdir():
        (folder / path.name).hardlink_to(path)
    line = [sys.executable, "-m", "hvd_train", "shard", "index", str(folder)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return folder


def first_round_s(data: Path, ranks: int, runs: Path) -> tuple[float, float]:
    """Seconds until the first round has ended, its evaluation and checkpoint not included; and the processor
    seconds of all ranks until their end."""
    options = [
        "--data",
        str(data),
        "--max-rounds",
        "1",
        "--patience",
        "0",
        "--runs",
        str(runs),
        "--threads",
        "1",
    ]
    program = [sys.executable, "-m", "hvd_train", "--name", data.name, *options]
    before = _children_s()
    began = time.time()
    line = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *program]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = (runs / data.name / "events.jsonl").read_text().splitlines()
    (ended,) = [event["time_s"] for event in map(json.loads, lines) if event["event"] == "round"]
    return float(ended) - began, _children_s() - before


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures, and prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        many = write_all(folder / "many", args.shards, args.rows)
        few = write_all(folder / "few", args.ranks, args.shards * args.rows // args.ranks)
        kinds = (few, many, with_index(many))
        times: dict[str, list[tuple[float, float]]] = {data.name: [] for data in kinds}
        for turn in range(args.repeat):
            for data in kinds:
                times[data.name].append(first_round_s(data, args.ranks, folder / f"runs-{turn}"))
        medians = {
            name: [statistics.median(column) for column in zip(*runs, strict=True)]
            for name, runs in times.items()
        }
        few_s, many_s = medians["few"][0], medians["many"][0]
        print(
            json.dumps(
                {
                    "shards": args.shards,
                    "ranks": args.ranks,
                    "cores": len(os.sched_getaffinity(0)),
                    **{f"{name}_s": round(wall_s, 1) for name, (wall_s, _) in medians.items()},
                    **{f"{name}_cpu_s": round(cpu_s, 1) for name, (_, cpu_s) in medians.items()},
                    "ratio": round(many_s / few_s, 2),
                    "limit_s": round(1.5 * few_s + 10, 1),
                    "within": many_s <= 1.5 * few_s + 10,
                }
            )
        )


if __name__ == "__main__":
    main()
