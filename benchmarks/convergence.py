"""What each rule of synchronization costs and brings, at the same number of samples: many trainings in one
resumable study. See README.md beside this file."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.averaging_cost import markdown
from benchmarks.study.data import write_all
from benchmarks.study.picture import draw
from benchmarks.study.plan import trainings_left
from benchmarks.study.problems import PROBLEMS, ROOT, Problem
from benchmarks.study.report import table
from benchmarks.study.results import Results

RESULTS = ROOT / "benchmarks" / "results" / "convergence.jsonl"
PICTURE = ROOT / "docs" / "pictures" / "convergence.png"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mnist", type=Path, default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that results are added to")
    parser.add_argument("--hours", type=float, default=8.0, help="begin no training after this time")
    names = sorted({p.name for p in PROBLEMS})
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="problems")
    parser.add_argument("--estimate", action="store_true", help="print what is left, and train nothing")
    parser.add_argument("--report", action="store_true", help="print the table, draw the picture")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="file that --report draws into")
    given = parser.parse_args()
    if not (given.estimate or given.report) and given.mnist is None:
        parser.error("--mnist: expected the folder with MNIST's idx files, or MNIST_DIR to be set")
    return given


def main() -> None:
    given = arguments()
    until = time.time() + 3600 * given.hours
    problems = [p for p in PROBLEMS if p.name in given.only]
    if given.report:
        results = Results(given.results)
        print(markdown(table(problems, results)))
        draw([p for p in PROBLEMS if p.name == "mlp"], results, given.picture)
        return
    print(estimate(problems, given.results))
    if given.estimate:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convergence-") as scratch:
        folder = Path(scratch)
        for ranks in dict.fromkeys(p.ranks for p in problems):
            ours = [p for p in problems if p.ranks == ranks]
            write_all(ours, folder / "data", given.mnist)
            train_on(ranks, folder, given, until)


def train_on(ranks: int, folder: Path, given: argparse.Namespace, until: float) -> None:
    """Starts one job that trains all that is left of the problems for so many ranks."""
    words = [str(folder / "data"), str(folder / "runs"), str(given.results.resolve())]
    line = [
        *("mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable),
        *("-m", "benchmarks.study.ranks", *words, "--until", str(until), "--only", *given.only),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMPI_MCA_mpi_yield_when_idle": "1"}
    with subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL) as job:
        try:
            status = job.wait()
        except BaseException:
            job.terminate()
            raise
    if status != 0:
        raise SystemExit(f"the job of {ranks} ranks ended with {status}: start it again to go on")


def estimate(problems: list[Problem], results: Path) -> str:
    """What is left, and how long that takes on two cores that have nothing else to do."""
    lines, seconds, so_far = [], 0.0, Results(results)
    for problem in problems:
        count = trainings_left(problem, so_far)
        seconds += count * problem.seconds
        lines.append(
            f"{problem.name}, {problem.ranks} ranks: {count} trainings of {problem.steps:,} local steps, "
            f"{problem.seconds:g} s each"
        )
    return "\n".join([*lines, f"together about {seconds / 3600:.1f} h"])


if __name__ == "__main__":
    main()
