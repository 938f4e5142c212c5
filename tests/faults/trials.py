"""Trials of a rank's death: one job of four ranks each, one of which is killed in a phase of its choice."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import launching
from tests.cluster.hosts import Hosts, mpirun
from tests.deadlines import seconds
from tests.faults.rank import (
    AFTER_MAPPING,
    AGREEMENT,
    ALL_GATHER,
    BEFORE_MAPPING,
    CLOSING,
    MODES,
    REDUCE,
    REDUCE_SCATTER,
    SLICE_STEP,
)
from tests.launching import Job

RANKS = 4
LAYOUTS = {"one host": (4,), "two hosts": (2, 2)}

_START_UP = (BEFORE_MAPPING, AFTER_MAPPING)
PHASES = {
    "one host": (*_START_UP, AGREEMENT, REDUCE, SLICE_STEP, ALL_GATHER, CLOSING),
    "two hosts": (*_START_UP, AGREEMENT, REDUCE, REDUCE_SCATTER, SLICE_STEP, ALL_GATHER, CLOSING),
}
"""On one host the all-gather is the second pass over shared memory, after a slice step. Between hosts the
reduce in shared memory has no end of its own: it is taken as the first moments of the reduce-scatter."""

LOST_WITHIN_S = 3.0
DEADLINE_S = 60.0


def missing() -> str:
    """Why no job can lose a rank here and go on; empty if one can."""
    command = shutil.which("mpirun", path=launching.environment()["PATH"])
    if command is None:
        return "mpirun is not installed"
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return (
        "" if "(Open MPI) 5" in shown else f"it takes Open MPI 5 to go on without a rank, not {shown.strip()}"
    )


@dataclass(frozen=True)
class Trial:
    """A death to be."""

    layout: str
    phase: str
    victim: int
    seed: int

    @property
    def mode(self) -> str:
        """How to average; some phases are too short, or are none, without a slice step."""
        sliced = self.phase == SLICE_STEP or (self.phase == ALL_GATHER and self.layout == "one host")
        return "sliced" if sliced else MODES[self.seed % len(MODES)]


@dataclass(frozen=True)
class Outcome:
    """A death that was survived."""

    phase: str
    """What the victim was doing when it died, as the others of its host see it; empty in the start-up."""

    landed: str
    """`x_0`, `x_t` or `x_(t+1)`: the anchor that all went on from."""

    slowest_s: float
    """From the kill to the last `RankLost`."""

    struck: bool
    """Whether it died in the phase that it should die in, which may pass while the signal is on its way."""


def trial(layout: str, phase: str, turn: int) -> Trial:
    """The n-th of a phase. The victims take turns, and begin with another rank in each phase."""
    first = PHASES[layout].index(phase)
    return Trial(layout, phase, (first + turn) % RANKS, first + 100 * turn)


RANK = ("-m", "tests.faults.rank")
"""What makes a rank of a Python that was just started."""


def carry_out(trial: Trial, hosts: Hosts | None, rank: Sequence[str] = RANK) -> Outcome:
    """Runs the job of a trial and asserts that those who lived went on as promised.

    Args:
        rank: what the processes of the job run, as arguments of Python; those of the trial are added.
    """
    with tempfile.TemporaryDirectory() as folder:
        what = (trial.phase, str(trial.victim), trial.mode, str(trial.seed), folder)
        job = _run(trial.layout, [*rank, *what], hosts)
        death = Path(folder, "victim.json")
        assert death.exists(), f"nobody was there to die: {trial}\n{job.output}"
        assert death.stat().st_size > 0, f"nobody died: {trial}\n{job.output}"
        reports = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("[0-9].json"))]
        return _judge(trial, job, reports, json.loads(death.read_text()))


def _run(layout: str, program: Sequence[str], hosts: Hosts | None) -> Job:
    env = {"OMP_NUM_THREADS": "1"}
    tolerant = ("--with-ft", "ulfm")
    if hosts is not None:
        line = mpirun(LAYOUTS[layout], program, *tolerant, env=env)
        before = {number: hosts.shared_memory(number) for number in hosts.numbers}
        job = hosts.run(1, line, deadline_s=DEADLINE_S, env=env)
        after = {number: hosts.shared_memory(number) for number in hosts.numbers}
        assert after == before, f"the job left files in /dev/shm, by host: {after}"
        return job
    start, *rest = launching.command("mpirun", RANKS, program)
    return launching.run([start, *tolerant, *rest], deadline_s=DEADLINE_S, env=env)


def _judge(trial: Trial, job: Job, reports: list[dict[str, Any]], death: dict[str, Any]) -> Outcome:
    said = f"{trial}\n{death}\n{reports}\n{job.output}"
    living = [rank for rank in range(RANKS) if rank != trial.victim]
    assert [report["rank"] for report in reports] == living, said
    slowest_s = max(report["lost_at"] for report in reports) - death["at"]
    assert slowest_s < seconds(LOST_WITHIN_S), said
    assert {report["size"] for report in reports} == {len(living)}, said
    # All have one anchor, the right one, and the same three right averages after it.
    assert len({report["anchor"] for report in reports}) == 1, said
    assert all(report["live"] == report["anchor"] == report["reference"] for report in reports), said
    assert len({str([bits for _, bits in report["rounds"]]) for report in reports}) == 1, said
    errors = [e for report in reports for e in (*report["errors"], *(error for error, _ in report["rounds"]))]
    assert all(error < 1e-6 for error in errors), said
    assert all(len(report["rounds"]) == 3 for report in reports), said
    assert all(report["kept"] for report in reports), said
    if "round" not in death:
        assert death["mapped"] is (trial.phase == AFTER_MAPPING), said
        return Outcome("", "x_0", slowest_s, struck=True)
    landed = {death["round"] - 1: "x_t", death["round"]: "x_(t+1)"}
    number = reports[0]["number"]
    assert number in landed, said
    (phase,) = {report["phase"] for report in reports if "phase" in report}
    named = {trial.phase, REDUCE_SCATTER} if trial.phase == REDUCE else {trial.phase}
    return Outcome(phase, landed[number], slowest_s, struck=phase in named)
