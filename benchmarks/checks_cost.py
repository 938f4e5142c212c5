"""What the checks of a training cost: checksums of the rows that it reads, and the marks of its progress.
Each is switched on and off in alternating blocks of rounds within one run. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.averaging_cost import ROOT, write_data
from hvd_train import liveness
from hvd_train.claim import NoClaim
from hvd_train.cli import parse
from hvd_train.comm.factory import connect
from hvd_train.data.rows import Rows
from hvd_train.record.reports import NullRecorder
from hvd_train.rundir import RunDirectory
from hvd_train.signals import StopRequest
from hvd_train.wiring import Wiring
from hvd_train.worker import Work, Worker

_WHAT = ("marks", "checksums")


@dataclass
class Switch:
    """Runs the local steps of `worker`, and turns the checks on and off at the ends of blocks of rounds."""

    worker: Worker
    turn: Callable[[bool], None]
    rounds: int
    """Of a block."""
    warm_up: int
    """Rounds before the first block."""
    wall: list[float] = field(default_factory=list)
    """Seconds of each block; the first is one with the checks on."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of this process in each block."""
    _done: int = 0
    _began: tuple[float, float] = (0.0, 0.0)

    def run(self, period: int) -> Work:
        counted = self._done - self.warm_up
        if counted >= 0 and counted % self.rounds == 0:
            now = time.perf_counter(), time.process_time()
            if counted:
                self.wall.append(now[0] - self._began[0])
                self.cpu.append(now[1] - self._began[1])
            self.turn(counted // self.rounds % 2 == 0)
            self._began = time.perf_counter(), time.process_time()
        self._done += 1
        return self.worker.run(period)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)


def train(what: str, args: argparse.Namespace) -> None:
    """One rank of the training; rank 0 prints what it measured as one line of JSON."""
    config = parse(args.training)
    with connect(config.backend, shared_folder=config.runs) as comm:
        wiring = Wiring(config, None, comm)
        run = RunDirectory(folder=Path(config.runs), is_new=False, checkpoint=None)
        training = wiring.assemble(run, NullRecorder(), StopRequest(), NoClaim())
        rows = wiring.reader._rows
        training.worker = switch = Switch(  # type: ignore[assignment]
            training.worker, _turn(what, comm.liveness, rows), args.rounds, args.warm_up
        )
        training.run()
        wiring.reader.close()
        if comm.rank == 0:
            print(json.dumps({"wall": switch.wall, "cpu": switch.cpu}), flush=True)


def _turn(what: str, patience: liveness.Liveness, rows: Rows) -> Callable[[bool], None]:
    """What turns a check on or off. A block is compared with its checksum when it is first read: with
    checksums on, each is read as if for the first time."""
    module, signs = liveness._signs, patience._signs

    def marks(on: bool) -> None:
        liveness._signs = module if on else None
        patience._signs = signs if on else None

    def checksums(on: bool) -> None:
        rows._verifiers.clear()
        rows.verify = on

    return {"marks": marks, "checksums": checksums}[what]


def measure(what: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in a job of its own; the ratio of the pairs of blocks."""
    rounds = args.warm_up + args.rounds * 2 * args.pairs + 1
    training = {
        "--data": folder / "data",
        "--data.reading": "stream" if what == "checksums" else "memory",
        "--runs": folder / "runs" / what,
        "--max-rounds": rounds,
        "--period": args.period,
        "--threads": args.threads,
        "--batch-size": 64,
        "--patience": 0,
        "--evaluate.every-epochs": 0,
        "--evaluate.every-rounds": 10 * rounds,
    }
    (folder / "runs" / what).mkdir(parents=True)
    own = ["--rank-of", what, "--rounds", str(args.rounds), "--warm-up", str(args.warm_up), "--"]
    words = [str(word) for pair in training.items() for word in pair] + ["--model.hidden", "500", "100"]
    done = subprocess.run(
        ["mpirun", "-np", str(args.ranks), sys.executable, "-m", "benchmarks.checks_cost", *own, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    wall, cpu = (
        [on / off for on, off in zip(f[::2], f[1::2], strict=True)] for f in (found["wall"], found["cpu"])
    )
    mean, half = statistics.fmean(wall), 1.96 * statistics.stdev(wall) / math.sqrt(len(wall))
    return {
        "what": what,
        "pairs": len(wall),
        "wall_ratio": mean,
        "wall_ratio_95": [mean - half, mean + half],
        "wall_ratio_median": statistics.median(wall),
        "cpu_s_on": sum(found["cpu"][::2]),
        "cpu_s_off": sum(found["cpu"][1::2]),
        "cpu_ratio_median": statistics.median(cpu),
        "wall_s": sum(found["wall"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a block")
    parser.add_argument("--pairs", type=int, default=150, help="pairs of blocks")
    parser.add_argument("--warm-up", type=int, default=50, help="rounds at the start that do not count")
    parser.add_argument("--period", type=int, default=10, help="local steps between two averages")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank")
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--rank-of", choices=_WHAT, help=argparse.SUPPRESS)
    parser.add_argument("training", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        train(args.rank_of, args)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", args.mnist, args.ranks)
        results = [measure(what, Path(folder), args) for what in _WHAT]
    for r in results:
        low, high = r["wall_ratio_95"]
        print(
            f"{r['what']:10} {r['wall_ratio']:.4f} (95 %: {low:.4f} to {high:.4f}), {r['pairs']} pairs, "
            f"median {r['wall_ratio_median']:.4f}; CPU {r['cpu_s_on']:.1f} s on, {r['cpu_s_off']:.1f} s off"
        )
    if args.json:
        state = {"data": data, "machine": platform.platform(), "cores": os.cpu_count(), "options": vars(args)}
        args.json.write_text(json.dumps({"results": results, **state}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
