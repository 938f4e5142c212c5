"""Kills many ranks, of each phase in turn, and prints what came of it: `python -m tests.faults.count`.

Here the ranks are forked from a server (warm.py), so that a kill takes 3 s and not 7. In the tests mpirun
starts each as a program of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tests import launching
from tests.cluster.hosts import Hosts
from tests.faults import warm
from tests.faults.trials import LAYOUTS, PHASES, Outcome, carry_out, trial

ADDRESS = f"hvd_train-{os.getpid()}"


@dataclass
class Row:
    """What came of the trials of a phase."""

    layout: str
    phase: str
    struck: list[Outcome] = field(default_factory=list)
    missed: int = 0
    failed: int = 0

    def __str__(self) -> str:
        landed = [sum(outcome.landed == x for outcome in self.struck) for x in ("x_0", "x_t", "x_(t+1)")]
        slowest_s = max((outcome.slowest_s for outcome in self.struck), default=0.0)
        cells = (self.layout, self.phase, len(self.struck), *landed, self.missed, self.failed)
        return f"| {' | '.join(map(str, cells))} | {slowest_s:.3f} |"

    def kill(self, turn: int, hosts: Hosts | None) -> None:
        attempt = trial(self.layout, self.phase, turn)
        try:
            outcome = carry_out(attempt, hosts, ["-I", "-S", warm.__file__, ADDRESS])
        except (AssertionError, OSError, ValueError, pytest.fail.Exception) as error:
            self.failed += 1
            print(f"failed: {attempt}: {error}", flush=True)
            return
        print(attempt, outcome, flush=True)
        if outcome.struck:
            self.struck.append(outcome)
        else:
            self.missed += 1


def warm_up(stack: ExitStack, hosts: Hosts | None, number: int) -> None:
    """Starts a server, on a host if there are any."""
    code = f"from tests.faults.warm import serve; serve({ADDRESS!r})"
    line = [sys.executable, "-c", code]
    env = launching.environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(launching.ROOT)})
    process = subprocess.Popen(hosts.enter(number, line) if hosts else line, env=env, stdout=subprocess.PIPE)
    stack.callback(process.wait)
    stack.callback(process.kill)
    process.stdout.readline()


HEAD = "| layout | phase | kills | x_0 | x_t | x_(t+1) | missed | failed | slowest RankLost (s) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in each phase of each layout")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--phases", nargs="+", help="only these")
    given = parser.parse_args()
    rows = [Row(layout, phase) for layout in given.layouts for phase in given.phases or PHASES[layout]]
    with ExitStack() as stack:
        two = stack.enter_context(Hosts(2)) if "two hosts" in given.layouts else None
        for hosts, number in [(None, 0), *((two, n) for n in (two.numbers if two else ()))]:
            warm_up(stack, hosts, number)
        turn = 0
        while left := [row for row in rows if len(row.struck) + row.failed < given.kills]:
            for row in left:
                row.kill(turn, two if len(LAYOUTS[row.layout]) > 1 else None)
            turn += 1
            print(HEAD, *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
