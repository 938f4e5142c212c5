"""One rank of a job that trains one training after the other: `python -m benchmarks.study.ranks`, started by
benchmarks/convergence.py."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.plan import next_training
from benchmarks.study.problems import PROBLEMS, Problem, Training
from benchmarks.study.results import Results
from hvd_train import connect, train
from hvd_train.comm.base import Communicator, OnSlice
from hvd_train.comm.buffer import Buffer
from hvd_train.record.events import read_events
from hvd_train.run.layout import EVENTS_FILE


class SentBytes:
    """Counts the averages, and what a rank would send in them if every rank had a host of its own: 2 (p-1)/p
    of each buffer. The first average of a buffer, the start from the values of rank 0, does not count."""

    def __init__(self, comm: Communicator) -> None:
        self.begin()
        self._average = comm.average
        self._share = 2 * (comm.size - 1) / comm.size
        comm.average = self._counted  # type: ignore[method-assign]

    def begin(self) -> None:
        """Begins to count for another training."""
        self.bytes = 0.0
        self.averages = 0
        """Of the buffer that was averaged most often."""

    def _counted(self, buffer: Buffer, weight: float, on_slice: OnSlice | None = None) -> bool:
        if buffer.version > 0:
            self.bytes += self._share * buffer.num_bytes
            self.averages = max(self.averages, buffer.version)
        return self._average(buffer, weight, on_slice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--until", type=float, default=float("inf"), help="Unix time")
    parser.add_argument("--only", nargs="*", help="names of problems")
    given = parser.parse_args()
    with connect() as comm:
        problems = [p for p in PROBLEMS if p.ranks == comm.size and (not given.only or p.name in given.only)]
        sent = SentBytes(comm)
        results = Results(given.results)
        while True:
            training = _next(comm, problems, results, given.until)
            if training is None:
                return
            values = _trained(training, comm, sent, given.data, given.runs)
            if values is None:
                return
            if comm.rank == 0:
                results.append(values)
                print(_line(values), flush=True)


def _next(comm: Communicator, problems: Sequence[Problem], results: Results, until: float) -> Training | None:
    """The next training, by the results that rank 0 has. Collective."""
    found = next_training(problems, results) if comm.rank == 0 and time.time() < until else None
    return comm.broadcast(found)


def _trained(
    training: Training, comm: Communicator, sent: SentBytes, data: Path, runs: Path
) -> dict[str, Any] | None:
    """The result of a training, on rank 0; None if it was interrupted. Collective."""
    config = training.placed(data, runs)
    sent.begin()
    began, cpu = time.perf_counter(), time.process_time()
    with _quiet():
        outcome = train(config, comm=comm)
    if outcome.reason == "interrupted":
        return None
    gc.collect()  # the buffers of the training, which ranks share
    costs = {
        "averages": sent.averages,
        "bytes": sent.bytes,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(sum(comm.allgather(time.process_time() - cpu)), 2),
    }
    if comm.rank != 0:
        return {}
    figures = _figures(outcome.run / EVENTS_FILE)
    shutil.rmtree(outcome.run)
    # One that diverged is evaluated with its last finite parameters, if at all.
    error = None if outcome.reason == "diverged" else outcome.final
    return {**training.key(), "error": error, "reason": outcome.reason, **figures, **costs}


def _figures(log: Path) -> dict[str, Any]:
    """What the event log of a run tells: the rounds, the samples, the metrics of the evaluation at the end,
    and the median of the drift."""
    events = list(read_events(log))
    (header,) = (e for e in events if e["event"] == "header")
    rounds = [e for e in events if e["event"] == "round"]
    drifts = sorted(e["drift"] for e in rounds if e.get("drift") is not None)
    (*_, metrics) = ({}, *(e["metrics"] for e in events if e["event"] == "evaluation"))
    return {
        "rounds": rounds[-1]["rounds"][1],
        "samples": sum(e["samples"] for e in rounds),
        "metrics": metrics,
        "drift": drifts[len(drifts) // 2] if drifts else None,
        "parameters": header["num_parameters"],
        "versions": {name: header["versions"][name] for name in ("hvd_train", "python", "torch")},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What a training prints is shown only if it fails."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except BaseException:
        sys.stderr.write(printed.getvalue())
        raise


def _line(values: dict[str, Any]) -> str:
    seed = values["settings"].get("seed", 0)
    error = "diverged" if values["error"] is None else f"{values['error']:.5g}"
    return (
        f"{time.strftime('%H:%M:%S')} {values['problem']} {values['ranks']} ranks, {values['split']}, "
        f"{values['rule']}, lr {values['lr']:g}, {values['part']}, seed {seed}: {error} "
        f"({values['averages']} averages, {values['seconds']:.1f} s, CPU {values['cpu_seconds']:.1f} s)"
    )


if __name__ == "__main__":
    main()
