"""What the checks and observations of a training cost: checksums of the rows that it reads, the marks of its
progress, the figures of ranks and layers, the sinks of its events. Each is switched on and off in alternating
blocks of rounds within one run. See README.md beside this file."""

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.averaging_cost import ROOT, write_data
from hvd_train import liveness
from hvd_train.algorithm.observer import Observer
from hvd_train.algorithm.worker import Work, Worker
from hvd_train.cli import parse
from hvd_train.comm.factory import connect
from hvd_train.data.rows import Rows
from hvd_train.preparation import prepare
from hvd_train.record.background import Background
from hvd_train.record.events import EventLog
from hvd_train.record.metrics import Metrics
from hvd_train.record.reports import NullRecorder, Recorder, Report, RunStart
from hvd_train.record.tensorboard import TensorBoard
from hvd_train.run.claim import NoClaim
from hvd_train.run.directory import RunDirectory, write_config
from hvd_train.run.layout import EVENTS_FILE
from hvd_train.run.signals import StopRequest
from hvd_train.wiring import Wiring

_WHAT = {
    "nothing": "the same blocks with nothing switched: what the method itself cannot tell apart",
    "marks": "marks of progress",
    "first": "checksums, every block as if it were read for the first time",
    "again": "checksums, every block compared before: all epochs but the first",
    "sinks": "TensorBoard's files, and figures for Prometheus that nobody asks for",
    "observation": "seconds, memory and CPU of each rank, and norms of each layer",
}


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
    """Seconds of each block."""
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
            self.turn(_is_on(counted // self.rounds))
            self._began = time.perf_counter(), time.process_time()
        self._done += 1
        return self.worker.run(period)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)


def _is_on(block: int) -> bool:
    """On, off, off, on, ...: neither comes first more often, and a steady drift cancels."""
    return block % 4 in (0, 3)


def train(what: str, args: argparse.Namespace) -> None:
    """One rank of the training; rank 0 prints what it measured as one line of JSON."""
    config = parse(args.training)
    with connect(config.backend, shared_folder=config.runs) as comm:
        wiring = Wiring(prepared=prepare(config, None, comm))
        run = RunDirectory(folder=Path(config.runs), is_new=False, checkpoint=None)
        log = EventLog(run.folder / EVENTS_FILE) if comm.rank == 0 else NullRecorder()
        sinks: list[Recorder] = []
        if what == "sinks" and comm.rank == 0:
            made = {"tensorboard": TensorBoard(), "metrics": Metrics(0, "127.0.0.1")}
            sinks = [Background(name, sink) for name, sink in made.items()]
            write_config(config, run.folder, NoClaim())
        recorder = Switched(log, sinks)
        training = wiring.assemble(run, recorder, StopRequest(), NoClaim())
        recorder.header(wiring.header(run, training))
        training.worker = switch = Switch(  # type: ignore[assignment]
            training.worker,
            _turn(what, comm.liveness, wiring.reader._reader._rows, training.observer, recorder),
            args.rounds,
            args.warm_up,
        )
        training.run()
        recorder.close()
        wiring.reader.close()
        if comm.rank == 0:
            print(json.dumps({"wall": switch.wall, "cpu": switch.cpu}), flush=True)


@dataclass
class Switched(Recorder):
    """The log, and sinks that get reports only while they are turned on."""

    log: Recorder
    sinks: Sequence[Recorder]
    on: bool = True

    def header(self, header: RunStart) -> None:
        for recorder in (self.log, *self.sinks):
            recorder.header(header)

    def report(self, report: Report) -> None:
        for recorder in (self.log, *self.sinks) if self.on else (self.log,):
            recorder.report(report)

    def close(self) -> None:
        for recorder in (self.log, *self.sinks):
            recorder.close()


def _turn(
    what: str, patience: liveness.Liveness, rows: Rows, observer: Observer, recorder: Switched
) -> Callable[[bool], None]:
    """What turns a check, the observation, or the sinks on or off."""
    turned_off = [time.perf_counter()]
    module, signs = liveness._signs, patience._signs

    def marks(on: bool) -> None:
        liveness._signs = module if on else None
        patience._signs = signs if on else None

    def first(on: bool) -> None:
        rows._verifiers.clear()
        rows.verify = on

    def again(on: bool) -> None:
        rows.verify = on

    def observation(on: bool) -> None:
        # The pause between two observations is one of blocks with observations.
        now = time.perf_counter()
        if on and not observer.enabled:
            observer._next_s += now - turned_off[0]
        turned_off[0] = now
        observer.enabled = on

    def sinks(on: bool) -> None:
        recorder.on = on

    def nothing(on: bool) -> None: ...

    turns = (nothing, marks, first, again, observation, sinks)
    return {turn.__name__: turn for turn in turns}[what]


def measure(what: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in a job of its own; the ratio of the pairs of blocks."""
    rounds = args.warm_up + args.rounds * 2 * args.pairs + 1
    training = {
        "--data": folder / "data",
        "--data.reading": "stream" if what in ("first", "again") else "memory",
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
    wall, cpu = _on_and_off(found["wall"]), _on_and_off(found["cpu"])
    logs = [math.log(on / off) for on, off in wall]
    mean, half = statistics.fmean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "what": what,
        "pairs": len(wall),
        "wall_ratio": math.exp(mean),
        "wall_ratio_95": [math.exp(mean - half), math.exp(mean + half)],
        "wall_ratio_median": statistics.median(on / off for on, off in wall),
        "cpu_s_on": sum(on for on, _ in cpu),
        "cpu_s_off": sum(off for _, off in cpu),
        "wall_s": sum(found["wall"]),
    }


def _on_and_off(blocks: Sequence[float]) -> list[tuple[float, float]]:
    """The pairs of neighbouring blocks, each as (on, off)."""
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return [(a, b) if _is_on(2 * i) else (b, a) for i, (a, b) in enumerate(pairs)]


def of_a_training(results: Sequence[dict[str, Any]], epochs: int) -> list[float]:
    """Lower end, ratio and upper end of what checksums cost a training of `epochs` epochs: its first reads
    every block for the first time."""
    first, again = (next(r for r in results if r["what"] == what) for what in ("first", "again"))
    ends = [[r["wall_ratio_95"][0], r["wall_ratio"], r["wall_ratio_95"][1]] for r in (first, again)]
    return [(f + (epochs - 1) * a) / epochs for f, a in zip(*ends, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of a block")
    parser.add_argument("--pairs", type=int, default=1200, help="pairs of blocks")
    parser.add_argument("--warm-up", type=int, default=50, help="rounds at the start that do not count")
    parser.add_argument("--period", type=int, default=10, help="local steps between two averages")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank")
    parser.add_argument("--what", nargs="+", choices=_WHAT, default=list(_WHAT), help="what is switched")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the training that is calculated")
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--rank-of", choices=_WHAT, help=argparse.SUPPRESS)
    parser.add_argument("training", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        train(args.rank_of, args)
        return 0
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", args.mnist, args.ranks)
        results = [measure(what, Path(folder), args) for what in args.what]
    for r in results:
        low, high = r["wall_ratio_95"]
        print(
            f"{r['what']:11} {r['wall_ratio']:.4f} (95 %: {low:.4f} to {high:.4f}), {r['pairs']} pairs, "
            f"median {r['wall_ratio_median']:.4f}; CPU {r['cpu_s_on']:.1f} s on, {r['cpu_s_off']:.1f} s off"
        )
    checksums = of_a_training(results, args.epochs) if {"first", "again"} <= {*args.what} else None
    if checksums:
        low, ratio, high = checksums
        print(f"checksums in a training of {args.epochs} epochs: {ratio:.4f} ({low:.4f} to {high:.4f})")
    if args.json:
        options = {k: v for k, v in vars(args).items() if k not in ("mnist", "json", "rank_of", "training")}
        state = {
            "what": _WHAT,
            "data": data,
            "training_of_epochs": {"epochs": args.epochs, "wall_ratio_and_95": checksums},
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "load_before": load,
            "options": options,
        }
        args.json.write_text(json.dumps({"results": results, **state}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
