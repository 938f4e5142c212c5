"""Rows/s of `hvd_train predict` beside a loop that only runs the model on rows in memory, and the memory of
its ranks. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import hvd_train
from benchmarks.averaging_cost import ROOT
from hvd_train.after.predict.parts import PartRows
from hvd_train.after.predict.predictor import Predictor
from hvd_train.cli import main as command
from hvd_train.comm.factory import connect
from hvd_train.config import Config, DataConfig, ModelConfig, StopConfig
from hvd_train.tasks.models import evaluating

SHARDS = 4
TRAINED_ROWS = 2_000


def write_rows(folder: Path, rows: int) -> str:
    """Shards of noise in the shape of MNIST, with the row as `id`; the pattern that names them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(SHARDS):
        first, stop = rows * i // SHARDS, rows * (i + 1) // SHARDS
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file["inputs"] = rng.integers(0, 256, (stop - first, 28, 28), np.uint8)
            file["targets"] = rng.integers(0, 10, stop - first, np.uint8)
            file["id"] = np.arange(first, stop)
    return str(folder / "*.h5")


def train(folder: Path, hidden: Sequence[int]) -> Path:
    """A run of two rounds: its figures do not matter."""
    config = Config(
        name="r",
        runs=str(folder / "runs"),
        backend="solo",
        data=DataConfig(path=write_rows(folder / "train", TRAINED_ROWS), scale=1 / 255),
        model=ModelConfig(hidden=tuple(hidden)),
        stop=StopConfig(patience=0, max_rounds=2),
    )
    return hvd_train.train(config).run


def loop(run: str, pattern: str, batch_size: int, threads: int) -> None:
    """One rank of the loop: its half of the rows, in memory. Rank 0 prints the rate of all."""
    torch.set_num_threads(threads)
    with connect() as comm:
        folder = Path(pattern).parent
        mine = []
        for path in sorted(folder.glob("*.h5"))[comm.rank :: comm.size]:
            with h5py.File(path) as file:
                mine.append(torch.from_numpy(file["inputs"][:]))
        rows = torch.cat(mine)
        model = hvd_train.load_model(run)
        with evaluating(model):
            model(rows[:batch_size])
            comm.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            for start in range(0, len(rows), batch_size):
                model(rows[start : start + batch_size])
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found = comm.allgather((len(rows), seconds))
        print(f"cpu {cpu}", flush=True)
        if comm.rank == 0:
            print("loop", sum(n for n, _ in found) / max(s for _, s in found), flush=True)


def rank(args: Sequence[str]) -> None:
    """One rank of `predict`, which prints its peak of memory and, from its first part on, its CPU seconds."""
    began: list[float] = []
    original = Predictor.predict

    def noted(predictor: Predictor, start: int, stop: int) -> PartRows:
        began.append(time.process_time())
        return original(predictor, start, stop)

    Predictor.predict = noted  # type: ignore[method-assign]
    code = command(["predict", *args])
    print(f"cpu {time.process_time() - began[0]}", flush=True)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}", flush=True)
    raise SystemExit(code)


def job(ranks: int, *words: str) -> str:
    done = subprocess.run(
        [
            "mpirun",
            "--bind-to",
            "none",
            "-np",
            str(ranks),
            sys.executable,
            "-m",
            "benchmarks.predict",
            *words,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def predict(folder: Path, pattern: str, run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One call: rows/s by its own last line, and the peak of each rank."""
    out = folder / "out.h5"
    options = ["--data", pattern, "--out", str(out), "--id", "id", "--batch-size", str(args.batch_size)]
    said = job(args.ranks, "--rank-of", "predict", "--", str(run), *options, "--threads", str(args.threads))
    with h5py.File(out) as file:
        assert np.array_equal(file["id"][:], np.arange(len(file["id"])))
    out.unlink()
    (rate,) = re.findall(r"([\d,]+) rows/s: ", said)
    return {
        "rows_per_s": float(rate.replace(",", "")),
        "cpu_s": cpu_seconds(said),
        "peak_bytes": sorted(map(int, re.findall(r"peak (\d+)", said))),
    }


def cpu_seconds(said: str) -> float:
    """Of all ranks."""
    return sum(map(float, re.findall(r"cpu ([\d.]+)", said)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    run = train(folder, args.hidden)
    patterns = {rows: write_rows(folder / f"rows-{rows}", rows) for rows in (args.rows // 10, args.rows)}
    small = predict(folder, patterns[args.rows // 10], run, args)
    loops, loops_cpu, calls = [], [], []
    for _ in range(args.repeat):
        words = ["--rank-of", "loop", "--", str(run), patterns[args.rows]]
        said = job(args.ranks, *words, str(args.batch_size), str(args.threads))
        loops.append(float(re.findall(r"loop ([\d.]+)", said)[0]))
        loops_cpu.append(cpu_seconds(said))
        calls.append(predict(folder, patterns[args.rows], run, args))
    rates = [call["rows_per_s"] for call in calls]
    return {
        "loop_rows_per_s": loops,
        "predict_rows_per_s": rates,
        "loop_cpu_s": loops_cpu,
        "predict_cpu_s": [call["cpu_s"] for call in calls],
        "ratio": statistics.median(rate / bare for rate, bare in zip(rates, loops, strict=True)),
        "peak_bytes": {args.rows // 10: small["peak_bytes"], args.rows: calls[-1]["peak_bytes"]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows; memory also for a tenth of them")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of a loop and a call of predict")
    parser.add_argument("--hidden", type=int, nargs="+", default=[500, 100], help="widths of the mlp")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--rank-of", choices=("loop", "predict"), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of == "predict":
        rank(args.words)
    if args.rank_of == "loop":
        run, pattern, batch_size, threads = args.words
        loop(run, pattern, int(batch_size), int(threads))
        return 0
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    for name in ("loop", "predict"):
        rates = result[f"{name}_rows_per_s"]
        middle, low, high = statistics.median(rates), min(rates), max(rates)
        print(f"{name:8} {middle:10,.0f} rows/s ({low:,.0f} to {high:,.0f})")
    print(f"ratio    {result['ratio']:.3f} (median of {args.repeat} pairs)")
    cpu = [statistics.median(result[f"{name}_cpu_s"]) for name in ("loop", "predict")]
    print(f"CPU      {cpu[0]:.1f} s in the loop, {cpu[1]:.1f} s in predict: {cpu[0] / cpu[1]:.3f}")
    for rows, peaks in result["peak_bytes"].items():
        print(f"memory   {rows:10,} rows: {', '.join(f'{peak >> 20:,} MiB' for peak in peaks)}")
    if args.json:
        options = {k: v for k, v in vars(args).items() if k not in ("json", "rank_of", "words")}
        state = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "torch": str(torch.__version__),
            "load_before": load,
            "options": options,
        }
        args.json.write_text(json.dumps({**result, **state}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
