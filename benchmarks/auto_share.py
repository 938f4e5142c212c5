"""The share of communication that `sync.schedule = "auto"` settles at, between emulated hosts on slow links.
Needs root. `python -m benchmarks.auto_share`, see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.averaging_cost import write_data
from hvd_train.record.events import read_events
from hvd_train.record.reports import PHASES
from hvd_train.tools.bench.table import align
from tests.cluster.hosts import Hosts, missing, mpirun

TARGETS = {"1gbit": (0.05, "512kb"), "100mbit": (0.25, "64kb")}
"""By rate of the links the share that is asked for, and the burst with which tc keeps to the rate."""

OUTER = {"none": 48, "nesterov": 500}
"""By outer optimizer the largest period."""

LEAST_ROUNDS = 10
"""Rounds after the last change that a share is measured over."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training settled at."""

    rate: str
    outer: str
    target: float
    periods: list[int]
    """Each k, in order."""
    rounds: int
    """With the last k."""
    share: float
    """Of communication, without what a rank waits for a slower one."""
    waiting: float
    """The share of that."""
    lines: list[str]
    """The events `period`."""

    @property
    def is_met(self) -> bool:
        """Within 1.5 points of the target, or the largest period and a line that says so."""
        largest = self.periods[-1] == OUTER[self.outer] and "Raise sync.max_period" in "".join(self.lines)
        return abs(self.share - self.target) <= 0.015 or (self.share > self.target and largest)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2, help="with one rank each")
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rates", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--outer", nargs="+", choices=OUTER, default=list(OUTER))
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    return parser.parse_args()


def train(hosts: Hosts, rate: str, outer: str, folder: Path, given: argparse.Namespace) -> Outcome:
    target, burst = TARGETS[rate]
    for number in hosts.numbers:
        hosts.rate(number, rate, burst)
    name = f"{rate}-{outer}"
    words = ["-m", "hvd_train", "--data", folder / "data", "--runs", folder / "runs", "--name", name]
    words += ["--model.hidden", "500", "100", "--batch-size", given.batch_size, "--threads", "1"]
    words += ["--schedule", "auto", "--sync.target-share", target, "--outer", outer]
    words += ["--max-seconds", given.seconds, "--patience", "0", "--evaluate.every-epochs", "0"]
    words += ["--evaluate.every-rounds", 1_000_000]
    job = hosts.run(
        1, mpirun([1] * given.hosts, [str(word) for word in words]), deadline_s=given.seconds + 300
    )
    if job.returncode != 0:
        sys.exit(f"{name}: the training ended with {job.returncode}:\n{job.output}")
    return outcome(rate, outer, target, list(read_events(folder / "runs" / name / "events.jsonl")))


def outcome(rate: str, outer: str, target: float, events: list[dict[str, Any]]) -> Outcome:
    """From the log. The seconds of an average are those of the round before: the first round with the last
    period is left out."""
    lines = [event for event in events if event["event"] == "period"]
    last = max((line["round"] for line in lines), default=0) + 1
    settled = [event for event in events if event["event"] == "round" and event["rounds"][0] > last]
    rounds = sum(event["rounds"][1] - event["rounds"][0] + 1 for event in settled)
    if rounds < LEAST_ROUNDS:
        sys.exit(f"{rate}, {outer}: {rounds} rounds after the last change of k: give more --seconds")
    seconds = {p: sum(event["seconds"][p]["median"] for event in settled) for p in PHASES}
    total = sum(seconds.values())
    header_s = sum(event["seconds"]["wait"]["min"] for event in settled)
    start = next(event for event in events if event["event"] == "header")
    return Outcome(
        rate=rate,
        outer=outer,
        target=target,
        periods=[start["period"], *(line["period"] for line in lines)],
        rounds=rounds,
        share=(seconds["communication"] + header_s) / total,
        waiting=(seconds["wait"] - header_s) / total,
        lines=[f"round {line['round']}: {line['message']}" for line in lines],
    )


def show(outcomes: list[Outcome]) -> None:
    head = ["link", "outer", "target", "k", "rounds", "share", "waiting", ""]
    rows = [
        [
            found.rate,
            found.outer,
            f"{found.target:.0%}",
            ", ".join(map(str, found.periods)),
            f"{found.rounds}",
            f"{found.share:.1%}",
            f"{found.waiting:.1%}",
            "met" if found.is_met else "missed",
        ]
        for found in outcomes
    ]
    print(align([head, *rows]))
    for found in outcomes:
        print(f"\n{found.rate}, {found.outer}", *found.lines, sep="\n  ")


def main() -> None:
    given = arguments()
    if reason := missing():
        sys.exit(f"auto_share: {reason}")
    outcomes: list[Outcome] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, Hosts(given.hosts) as hosts:
        folder = Path(name)
        data = write_data(folder / "data", given.mnist, given.hosts)
        for rate in given.rates:
            for outer in given.outer:
                print(f"training over {rate}, {outer}", file=sys.stderr, flush=True)
                outcomes.append(train(hosts, rate, outer, folder, given))
    print(f"{data}, {given.hosts} hosts with one rank each, load before {load:.2f}\n")
    show(outcomes)
    if given.json:
        given.json.write_text(json.dumps([asdict(found) for found in outcomes], indent=2) + "\n")


if __name__ == "__main__":
    main()
