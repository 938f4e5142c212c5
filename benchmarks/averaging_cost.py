"""What averaging costs: samples/s of the MNIST mlp without averaging and with each backend, and where the
time goes. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvd_train.data.sources import Arrays, open_source
from hvd_train.data.writer import write_part
from hvd_train.record.events import read_events
from hvd_train.record.reports import PHASES

ROOT = Path(__file__).resolve().parent.parent
WAYS = {
    "not averaging": ["--sync", "none", "--backend", "mpi"],
    "ring": ["--backend", "ring"],
    "mpi": ["--backend", "mpi"],
    "horovod": ["--backend", "horovod"],
}
"""What is compared, by name: the options of each. The first is what the others are divided by."""

MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run."""

    way: str
    repetition: int
    samples_per_s: float
    """Of all ranks, by rank 0's wall clock over the rounds that were counted."""
    seconds_per_round: dict[str, float]
    """Median over the ranks, by phase, mean over the rounds."""
    state: dict[str, Any]
    """The header event of the run."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each run")
    parser.add_argument(
        "--warm-up", type=int, default=50, help="rounds at the start of a run that do not count"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each way, interleaved")
    parser.add_argument("--period", type=int, default=10, help="local steps between two averages")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to compare")
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    args = parser.parse_args()
    if not 1 <= args.warm_up < args.rounds:
        parser.error(f"--warm-up {args.warm_up}: expected at least 1 and less than --rounds {args.rounds}")
    return args


def write_data(folder: Path, mnist: str | None, shards: int) -> str:
    """Writes the shards, MNIST's or noise of the same shape; returns which."""
    if mnist:
        files = [str(next(Path(mnist).glob(f"{name}*"))) for name in MNIST]
        arrays, name = open_source(files), "MNIST"
    else:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (60_000, 28, 28), np.uint8)
        arrays = Arrays(images, rng.integers(0, 10, 60_000, np.uint8), 1 / 255)
        name = "noise of the shape of MNIST"
    write_part(folder, arrays, part="train", shards=shards, shuffle_seed=0)
    return name


def run_once(way: str, repetition: int, folder: Path, args: argparse.Namespace) -> Measurement:
    """Trains in a job of its own and reads the event log."""
    name = f"{way.replace(' ', '-')}-{repetition}"
    options = {
        "--data": folder / "data",
        "--runs": folder / "runs",
        "--name": name,
        "--max-rounds": args.rounds,
        "--period": args.period,
        "--threads": args.threads,
        "--batch-size": 64,
        "--patience": 0,
        "--evaluate.every-epochs": 0,
        "--evaluate.every-rounds": args.rounds,  # at the end only, after what is counted
    }
    words = [str(word) for pair in options.items() for word in pair] + ["--model.hidden", "500", "100"]
    launcher = [
        ROOT / "launch" / "mpirun.sh",
        "--host",
        f"localhost:{args.ranks}",
        "-np",
        str(args.ranks),
        "--",
    ]
    done = subprocess.run(
        [*map(str, launcher), *words, *WAYS[way]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        raise SystemExit(f"{way}: the training ended with {done.returncode}:\n{done.stdout}")
    return read_run(way, repetition, folder / "runs" / name / "events.jsonl", args.warm_up)


def read_run(way: str, repetition: int, log: Path, warm_up: int) -> Measurement:
    """The figures of the lines of a log whose rounds all come after the warm-up."""
    events = list(read_events(log))
    (header,) = (e for e in events if e["event"] == "header")
    counted = [e for e in events if e["event"] == "round" and e["rounds"][0] > warm_up]
    before = [e for e in events if e["event"] == "round" and e["rounds"][0] <= warm_up]
    if not counted or not before:
        raise SystemExit(f"of {len(before) + len(counted)} lines none are left to count: give more --rounds")
    rounds = sum(e["rounds"][1] - e["rounds"][0] + 1 for e in counted)
    # A line carries the time at the end of its last round.
    seconds = counted[-1]["time_s"] - before[-1]["time_s"]
    return Measurement(
        way=way,
        repetition=repetition,
        samples_per_s=sum(e["samples"] for e in counted) / seconds,
        seconds_per_round={p: sum(e["seconds"][p]["median"] for e in counted) / rounds for p in PHASES},
        state=header,
    )


def table(measurements: Sequence[Measurement], ways: Sequence[str]) -> list[list[str]]:
    """Rows of cells: median, spread and ratio of samples/s, and the phases in ms a round."""
    phases = [f"{phase} ms" for phase in PHASES]
    rows = [["", "samples/s", "min to max", f"of {ways[0]}", *phases]]
    base = {m.repetition: m.samples_per_s for m in measurements if m.way == ways[0]}
    for way in ways:
        runs = [m for m in measurements if m.way == way]
        speeds = [m.samples_per_s for m in runs]
        # Of the same repetition: what slows the machine down for a while slows both.
        ratio = statistics.median(m.samples_per_s / base[m.repetition] for m in runs)
        spent = [f"{1000 * statistics.median(m.seconds_per_round[p] for m in runs):.2f}" for p in PHASES]
        speed = f"{statistics.median(speeds):,.0f}"
        rows.append([way, speed, f"{min(speeds):,.0f} to {max(speeds):,.0f}", f"{ratio:.1%}", *spent])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown that is also readable as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def circumstances(
    args: argparse.Namespace, data: str, load: float, measurements: Sequence[Measurement]
) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    header = measurements[0].state
    libraries = {m.way: m.state["versions"]["mpi"] for m in measurements}
    model = next(
        (
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "?",
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "system": platform.platform(),
        "versions": {name: header["versions"][name] for name in ("hvd_train", "python", "torch")},
        "libraries": libraries,
        "data": data,
        "model": header["model"],
        "parameters": header["num_parameters"],
        "batch_size": header["batch_size"],
        "samples_per_rank": header["samples_per_rank"],
        **{
            name: getattr(args, name)
            for name in ("ranks", "period", "threads", "rounds", "warm_up", "repetitions")
        },
    }


def main() -> None:
    args = arguments()
    if shutil.which("horovodrun", path=f"{sys.prefix}/bin") is None and "horovod" in args.ways:
        print("Horovod is not installed: left out", file=sys.stderr)
        args.ways.remove("horovod")
    load = os.getloadavg()[0]
    measurements = []
    with tempfile.TemporaryDirectory() as name:
        data = write_data(Path(name) / "data", args.mnist, args.ranks)
        for repetition in range(args.repetitions):
            # Another one is first each time: what comes first may find a cooler or a warmer machine.
            first = repetition % len(args.ways)
            for way in args.ways[first:] + args.ways[:first]:
                measurements.append(run_once(way, repetition, Path(name), args))
                print(f"{repetition} {way}: {measurements[-1].samples_per_s:,.0f} samples/s", file=sys.stderr)
    about = circumstances(args, data, load, measurements)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(markdown(table(measurements, args.ways)))
    if args.json:
        runs = [{key: value for key, value in asdict(m).items() if key != "state"} for m in measurements]
        args.json.write_text(json.dumps({"about": about, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
