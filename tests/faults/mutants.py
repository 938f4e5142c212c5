"""Damages files in many ways and counts what comes of it.

    python -m tests.faults.mutants shards --count 10000 --seed 0

Mutants are judged in worker processes, a batch in each. A worker that ends by a signal is a crash, and what
it left on stderr must name the file; one that says nothing for too long is a hang.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.faults import mutate_shards

BATCH = 250
HANGS_AFTER_S = 60
LISTED = 5


@dataclass
class Tally:
    """How many mutants had which outcome, and the first of each that should not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, index: int, outcome: str, detail: str = "") -> None:
        self.outcomes[outcome] += 1
        if outcome not in mutate_shards.RIGHT and self.outcomes[outcome] <= LISTED:
            self.bad.append(f"mutant {index}: {outcome}: {detail}")


def run(count: int, seed: int, corrected: bool = False) -> Tally:
    """Judges mutants 0 to `count` - 1 of a seed; `corrected` makes their checksums fit the damage."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        mutate_shards.prepare(folder / "templates")
        done = 0
        while done < count:
            for index, outcome, detail in _batch(
                folder, range(done, min(done + BATCH, count)), seed, corrected
            ):
                tally.add(index, outcome, detail)
                done = index + 1
    return tally


def _batch(folder: Path, indices: range, seed: int, corrected: bool) -> Iterator[tuple[int, str, str]]:
    """The outcomes of mutants in one worker: of all, or up to the one that ended it."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(theirs, folder, indices, seed, corrected))
    worker.start()
    theirs.close()
    try:
        for index in indices:
            if not ours.poll(HANGS_AFTER_S):
                yield index, "hang", f"nothing for {HANGS_AFTER_S} s"
                return
            try:
                outcome, detail = ours.recv()
            except EOFError:
                worker.join()
                text = (folder / "stderr").read_text(errors="replace")
                named = str(work / str(index)) in text
                yield (
                    index,
                    "crash, file named" if named else "crash, file not named",
                    f"{worker.exitcode} {text}",
                )
                return
            yield index, outcome, detail
    finally:
        ours.close()
        worker.kill()
        worker.join()


def _work(results: Connection, folder: Path, indices: range, seed: int, corrected: bool) -> None:
    stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    for index in indices:
        place = folder / "work" / str(index)
        try:
            outcome, detail = mutate_shards.outcome_of(folder / "templates", place, index, seed, corrected)
        except Exception:
            outcome, detail = "exception of the test itself", traceback.format_exc()
        shutil.rmtree(place, ignore_errors=True)
        results.send((outcome, detail))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["shards"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corrected", action="store_true", help="make the checksums fit the damage")
    given = parser.parse_args()
    tally = run(given.count, given.seed, given.corrected)
    print(*tally.bad, sep="\n")
    sums = "corrected" if given.corrected else "as they were"
    print(f"{given.count} mutants, seed {given.seed}, checksums {sums}")
    for outcome, number in sorted(tally.outcomes.items(), key=lambda item: -item[1]):
        print(f"| {outcome} | {number} |")
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
