"""Processes that judge mutants: each is replaced when it crashes or hangs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.deadlines import Deadline
from tests.faults.mutate_shards import CRASH, CRASH_UNNAMED, FOREIGN, HANG, outcome_of

MUTANTS_A_WORKER = 500
MOST_CPU_S = 20
MOST_WAIT_S = 120
"""On an idle machine; nothing is waited for but the disk."""
MOST_MEMORY_BYTES = 3 << 30
"""Beside what a worker has when it starts: of addresses, as `ulimit -v`."""


@dataclass(frozen=True)
class Mutant:
    """Its layout, and its number there."""

    layout: str
    number: int

    def __str__(self) -> str:
        return f"--layout '{self.layout}' --number {self.number}"


@dataclass(frozen=True)
class Result:
    """What came of a mutant."""

    mutant: Mutant
    outcome: str
    detail: str
    cpu_s: float = 0.0
    grown_bytes: int = 0
    """By how much the largest resident memory of its worker grew."""

    def __str__(self) -> str:
        return f"{self.mutant}: {self.outcome}: {self.detail}"


def judge(folder: Path, mutants: Sequence[Mutant], jobs: int) -> Iterator[Result]:
    """The results of `mutants`, in any order. Their files are made in `folder`, by `jobs` processes at a
    time."""
    waiting = deque(mutants)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                size = min(len(waiting), MUTANTS_A_WORKER)
                workers.append(_Worker(folder, deque(waiting.popleft() for _ in range(size))))
            wait([worker.results for worker in workers], timeout=1)
            for worker in list(workers):
                yield from worker.take()
                if worker.ended:
                    workers.remove(worker)
                    worker.stop()
                    waiting.extendleft(reversed(worker.left))
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, and the mutants that it is still to judge."""

    _count = 0

    def __init__(self, folder: Path, mutants: deque[Mutant]) -> None:
        _Worker._count += 1
        self.left = mutants
        self.ended = False
        self._place = folder / f"worker {_Worker._count}"
        self._place.mkdir()
        context = multiprocessing.get_context("fork")
        self.results, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(theirs, folder / "templates", self._place, tuple(mutants))
        )
        self._process.start()
        theirs.close()
        self._deadline = Deadline(MOST_WAIT_S)

    def take(self) -> Iterator[Result]:
        """The results that are there. After the last one of a worker, `ended` is true."""
        while not self.ended and self.results.poll():
            try:
                outcome, detail, cpu_s, grown = self.results.recv()
            except EOFError:
                yield self._died(self.left.popleft())
            else:
                yield Result(self.left.popleft(), outcome, detail, cpu_s, grown)
                self._deadline = Deadline(MOST_WAIT_S)
            self.ended = self.ended or not self.left
        if not self.ended and self._deadline.passed():
            self.ended = True
            yield Result(self.left.popleft(), HANG, str(self._deadline))

    def _died(self, mutant: Mutant) -> Result:
        self.ended = True
        self._process.join()
        text = (self._place / "stderr").read_text(errors="replace")
        if self._process.exitcode == -24:  # SIGXCPU
            return Result(mutant, HANG, f"more than {MOST_CPU_S} s of CPU time")
        named = f"<{self._place}/mutant/" in text
        return Result(mutant, CRASH if named else CRASH_UNNAMED, f"{self._process.exitcode} {text}")

    def stop(self) -> None:
        """Ends the process, and removes its files."""
        self.results.close()
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._place, ignore_errors=True)


def _work(results: Connection, templates: Path, folder: Path, mutants: Sequence[Mutant]) -> None:
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MOST_MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for mutant in mutants:
        results.send(_judge(templates, folder / "mutant", mutant))


def _judge(templates: Path, place: Path, mutant: Mutant) -> tuple[str, str, float, int]:
    began, largest = time.process_time(), _largest()
    limit = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(began) + MOST_CPU_S + 1, limit))
    try:
        judged = outcome_of(templates, place, mutant.layout, mutant.number)
        outcome, detail = judged.outcome, f"{judged.done}: {judged.said}"
    except Exception:
        outcome, detail = FOREIGN, f"of the test itself: {traceback.format_exc()}"
    shutil.rmtree(place, ignore_errors=True)
    return outcome, detail, time.process_time() - began, _largest() - largest


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
