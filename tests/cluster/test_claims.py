"""One run's folder on a file system that several hosts share: who trains in it, and who takes it over."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.deadlines import seconds
from tests.launching import Job, Process, is_rank, send, wait_for
from tests.mpi.jobs import events, has_recorded

pytestmark = pytest.mark.cluster

OPTIONS = (
    *("--config", "hvd_train/demo/digits.toml", "--task", "tests/mpi/sleepy.py:Slow", "--name", "r"),
    *("--patience", "0", "--checkpoint.every-rounds", "1", "--evaluate.every-rounds", "5"),
)
IMPATIENT = """
import sys
from hvd_train.run import claim
from hvd_train.cli import main

claim.STALE_S = float(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@contextmanager
def training(hosts: Hosts, runs: Path) -> Iterator[tuple[Process, list[int]]]:
    """A long training on h1 and h2 that has written a checkpoint, and its ranks, rank 0 on h1."""
    line = ["-m", "hvd_train", "--runs", str(runs), *OPTIONS, "--max-rounds", "100000"]
    with hosts.start(1, mpirun([1, 1], line)) as process:
        wait_for(lambda: has_recorded(runs / "r", "checkpoint", 2), 90, process)
        pids = [hosts.pids(host, r"python\S* -m hvd_train") for host in (1, 2)]
        yield process, [pid for found in pids for pid in found if is_rank(pid)]


def resume(hosts: Hosts, host: int, runs: Path, stale_s: float, rounds: int) -> Job:
    """A job of one process that goes on with the run."""
    options = ["--runs", str(runs), *OPTIONS, "--resume", "auto", "--max-rounds", str(rounds)]
    line = [sys.executable, "-c", IMPATIENT, str(stale_s), *options]
    return hosts.run(host, line, deadline_s=150)


def reached(runs: Path) -> int:
    return max(e["round"] for e in events(runs / "r", "checkpoint"))


def test_a_job_on_another_host_is_refused_until_the_first_has_gone(hosts: Hosts, tmp_path: Path) -> None:
    with training(hosts, tmp_path) as (process, _):
        refused = resume(hosts, 3, tmp_path, 100, 1_000_000)
        assert refused.returncode == 2, refused.output
        waits, why = [line for line in refused.stderr.splitlines() if line.startswith("hvd_train: ")]
        assert "Waiting 100 s for a sign of life" in waits
        assert "is in use by process" in why
        assert " on h1 (since " in why
        assert process.poll() is None
        hosts.poweroff(1)
        try:
            done = reached(tmp_path)
            over = resume(hosts, 3, tmp_path, 8, done + 2)
        finally:
            hosts.boot(1)
        assert over.returncode == 0, over.output
        assert " on h1 (since " in over.stderr
        assert "which gave no sign of life for 8 s." in over.stderr
    # It may have gone before it reported its last checkpoint.
    assert events(tmp_path / "r", "header")[-1]["round"] in (done, done + 1)
    assert events(tmp_path / "r", "stop")[-1]["round"] == done + 2


def test_a_job_that_continues_after_a_takeover_writes_nothing(hosts: Hosts, tmp_path: Path) -> None:
    with training(hosts, tmp_path) as (process, ranks):
        assert len(ranks) == 2
        send(ranks, signal.SIGSTOP)
        done = reached(tmp_path)
        over = resume(hosts, 3, tmp_path, 8, done + 2)
        assert over.returncode == 0, over.output
        written = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
        send(ranks, signal.SIGCONT)
        _, said = process.communicate(timeout=seconds(120))
        assert process.returncode != 0
        (line,) = [line for line in said.splitlines() if "was taken over by" in line]
        assert "by process" in line
        assert " on h3 (since " in line
    files = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    assert {p: b for p, b in files.items() if not any(f.startswith(".round") for f in p.parts)} == written
