"""`hvd_train launch` over two hosts: it trains; however it ends, the exit code says so and nothing stays."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.deadlines import seconds
from tests.launching import Process, assert_nothing_is_left, wait_for
from tests.mpi.jobs import SHORT, events, has_recorded

pytestmark = pytest.mark.cluster

PLACE = ("--hosts", "h1:2,h2:2")
ENDLESS = ("--max-rounds", "1000000", "--patience", "0")
LAUNCHERS = {
    "mpirun": (),
    "horovodrun": ("--launcher", "horovodrun"),
    "gloo": ("--launcher", "horovodrun", "--gloo"),
}


def line(runs: Path, launcher: str, *options: str) -> list[str]:
    launch = [sys.executable, "-m", "hvd_train", "launch", *PLACE, *LAUNCHERS[launcher], "--"]
    return [*launch, "--runs", str(runs), "--name", "a", *options]


@contextmanager
def training(hosts: Hosts, runs: Path, launcher: str) -> Iterator[tuple[Process, int]]:
    """A training on two hosts that has done a round, and the number of the process that was started."""
    with hosts.start(1, line(runs, launcher, *ENDLESS)) as process:
        wait_for(lambda: has_recorded(runs / "a", "round"), 60, process)
        (pid,) = [p for p in hosts.pids(1, "hvd_train launch") if _parent_is_outside(hosts, p)]
        yield process, pid


def _parent_is_outside(hosts: Hosts, pid: int) -> bool:
    """The first of a host's processes; what it forked has the same command line, and may end."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return parent not in hosts.pids(1)


def test_it_trains_over_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    before = hosts.bytes(2).tx
    job = hosts.run(1, line(tmp_path, "mpirun", *SHORT), deadline_s=90)
    assert job.returncode == 0, job.output
    assert "4 ranks on 2 hosts (h1, h2)" in job.stdout
    (stop,) = events(tmp_path / "a", "stop")
    assert (stop["reason"], stop["round"]) == ("max_rounds", 12)
    assert hosts.bytes(2).tx - before > 12 * 17_226 * 4  # as many averages of so many parameters, at least


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_ends_it_with_a_checkpoint_and_75(launcher: str, hosts: Hosts, tmp_path: Path) -> None:
    with training(hosts, tmp_path, launcher) as (process, pid):
        os.kill(pid, signal.SIGTERM)
        out, said = process.communicate(timeout=seconds(60))
        assert process.returncode == 75, said
        assert "4 ranks on 2 hosts (h1, h2)" in out
        assert "SIGTERM: the run ends after its round, with a checkpoint" in said
        assert (
            f"Go on: python -m hvd_train launch {' '.join((*PLACE, *LAUNCHERS[launcher]))} -- --resume"
            in said
        )
        assert_nothing_is_left(process, 5)
    assert events(tmp_path / "a", "stop")[0]["reason"] == "interrupted"
    assert (tmp_path / "a" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_outlives_a_killed_launch(launcher: str, hosts: Hosts, tmp_path: Path) -> None:
    with training(hosts, tmp_path, launcher) as (process, pid):
        os.kill(pid, signal.SIGKILL)
        assert_nothing_is_left(process, 20)


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_lost_host_is_a_failure(launcher: str, hosts: Hosts, tmp_path: Path) -> None:
    with training(hosts, tmp_path, launcher) as (process, _):
        hosts.poweroff(2)
        try:
            _, said = process.communicate(timeout=seconds(60))  # it was seen to take 13 s, over Gloo 34
        finally:
            hosts.boot(2)
        assert process.returncode == 1, said
        assert "the run did not finish" in said
        assert "Go on: python -m hvd_train launch" in said or "There is no checkpoint" in said
        assert_nothing_is_left(process, 5)
