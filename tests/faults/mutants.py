"""Damages shards in many ways and counts what comes of reading them.

    python -m tests.faults.mutants --mutants 20000 --seed 1
    python -m tests.faults.mutants --layout groups --number 1000017

The second line repeats one mutant, and prints what was done and said. Mutants are judged in worker processes
with bounded memory. A worker that ends by a signal is a crash, and what it left on stderr must name the file;
one that takes too much CPU time, or that waits for too long, is a hang.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import mutate_shards
from tests.faults.mutant_workers import Mutant, Result, judge
from tests.faults.shard_layouts import LAYOUTS

NUMBERS_A_SEED = 1_000_000
LISTED = 5


@dataclass
class Tally:
    """How many mutants had which outcome, and what should not be."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """By the name of the layout."""

    listed: Counter[str] = field(default_factory=Counter)

    slowest: Result | None = None
    largest: Result | None = None

    def add(self, result: Result) -> Iterator[str]:
        """Counts a mutant; lines about it, if it should not be so or HDF5 crashed."""
        self.outcomes.setdefault(result.mutant.layout, Counter())[result.outcome] += 1
        if self.slowest is None or result.cpu_s > self.slowest.cpu_s:
            self.slowest = result
        if self.largest is None or result.grown_bytes > self.largest.grown_bytes:
            self.largest = result
        if result.outcome not in mutate_shards.RIGHT or result.outcome == mutate_shards.CRASH:
            self.listed[result.outcome] += 1
            if self.listed[result.outcome] <= LISTED:
                yield str(result)

    def total(self) -> Counter[str]:
        """Of all layouts."""
        return sum(self.outcomes.values(), Counter())

    def table(self) -> Iterator[str]:
        """In Markdown, a line for each layout."""
        columns = [name for name in (*mutate_shards.RIGHT, *mutate_shards.WRONG) if self.total()[name]]
        yield f"| layout | mutants | {' | '.join(columns)} |"
        yield "|---|" + "---:|" * (len(columns) + 1)
        for name, counts in (*self.outcomes.items(), ("all", self.total())):
            cells = [f"{number:,}" for number in (counts.total(), *(counts[c] for c in columns))]
            yield f"| {name} | {' | '.join(cells)} |"


def mutants(count: int, seed: int) -> list[Mutant]:
    """`count` mutants, the layouts in turn."""
    names = list(LAYOUTS)
    return [Mutant(names[i % len(names)], seed * NUMBERS_A_SEED + i // len(names)) for i in range(count)]


def run(chosen: Sequence[Mutant], jobs: int) -> Tally:
    """Judges mutants, and prints lines about those that should not be."""
    tally = Tally({name: Counter() for name in LAYOUTS if any(m.layout == name for m in chosen)})
    with tempfile.TemporaryDirectory(prefix="mutants-", dir=_scratch()) as name, _open(name):
        folder = Path(name)
        mutate_shards.prepare(folder / "templates", list(LAYOUTS))
        for result in judge(folder, chosen, jobs):
            for line in tally.add(result):
                print(line, flush=True)
            if len(chosen) == 1:
                print(result)
    return tally


@contextlib.contextmanager
def _open(folder: str) -> Iterator[None]:
    """Has the folder open: tests that run beside this see that it is in use."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)


def _scratch() -> str | None:
    """In memory, if there is such a place: each mutant is written and removed."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20_000, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="worker processes")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="of a single mutant")
    parser.add_argument("--number", type=int, help="of a single mutant")
    given = parser.parse_args()
    chosen = [Mutant(given.layout, given.number)] if given.layout else mutants(given.mutants, given.seed)
    tally = run(chosen, given.jobs)
    print(*tally.table(), sep="\n")
    for what, result in (("slowest", tally.slowest), ("largest", tally.largest)):
        if result is not None:
            mib = result.grown_bytes / (1 << 20)
            print(f"{what}: {result.mutant}: {result.cpu_s:.1f} s of CPU time, {mib:.0f} MiB more memory")
    total = tally.total()
    return 1 if any(total[name] for name in mutate_shards.WRONG) else 0


if __name__ == "__main__":
    sys.exit(main())
