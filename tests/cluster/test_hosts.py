"""The emulated hosts are what a test over hosts takes them for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, mpirun
from tests.deadlines import Deadline
from tests.launching import ROOT, Process

pytestmark = pytest.mark.cluster

PYTHON = sys.executable
SECOND_S = 10.0
"""A deadline for what takes a moment."""

SHARED_REGION = """
import signal
from hvd_train.comm._shm import Region
region = Region.create(0)
print(region.address().hex(), flush=True)
signal.pause()
"""
VISIBLE = """
import sys
from hvd_train.comm._shm import Region
print(Region.is_visible(bytes.fromhex(sys.argv[1])))
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000), timeout=20) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    print(peer.recv(100).decode(), time.monotonic() - began)
"""
RECEIVE = """
import socket
with socket.create_server(("", 5000)) as server:
    print("listening", flush=True)
    while True:
        with server.accept()[0] as peer:
            count = 0
            while data := peer.recv(1 << 16):
                count += len(data)
            peer.sendall(str(count).encode())
"""


@contextmanager
def receiver(hosts: Hosts, host: int) -> Iterator[Process]:
    """Takes what `send` sends."""
    with hosts.start(host, [PYTHON, "-c", RECEIVE]) as process:
        assert process.stdout.readline() == "listening\n"
        yield process


def send(hosts: Hosts, host: int, to: str, num_bytes: int) -> tuple[int, float]:
    """Bytes that arrived, and in what time, in seconds."""
    job = hosts.run(host, [PYTHON, "-c", SEND, to, str(num_bytes)], deadline_s=60)
    assert job.returncode == 0, job.output
    count, seconds = job.stdout.split()
    return int(count), float(seconds)


def output(hosts: Hosts, host: int, *argv: str) -> str:
    job = hosts.run(host, argv, deadline_s=SECOND_S)
    assert job.returncode == 0, job.output
    return job.stdout.strip()


def test_each_host_has_its_own_name_and_all_know_each_other(hosts: Hosts) -> None:
    name = "import socket; print(socket.gethostname())"
    assert [output(hosts, n, PYTHON, "-c", name) for n in hosts.numbers] == ["h1", "h2", "h3", "h4"]
    for other in ("h1", "h2", "h4"):
        assert output(hosts, 3, "ssh", other, f'{PYTHON} -c "{name}"') == other


def test_hosts_share_their_files_but_no_memory(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("for all")
    output(hosts, 1, "touch", "/dev/shm/mine")
    try:
        for number in (1, 2):
            assert output(hosts, number, "cat", str(tmp_path / "file")) == "for all"
        assert [hosts.shared_memory(n) for n in (1, 2)] == [["mine"], []]
        assert output(hosts, 1, "ls", "/dev/shm") == "mine"
        assert output(hosts, 2, "ls", "/dev/shm") == ""
        assert not Path("/dev/shm/mine").exists()
    finally:
        output(hosts, 1, "rm", "/dev/shm/mine")


def test_a_region_of_memory_is_seen_within_its_host_only(hosts: Hosts) -> None:
    with hosts.start(1, [PYTHON, "-c", SHARED_REGION]) as process:
        address = process.stdout.readline().strip()
        assert output(hosts, 1, PYTHON, "-c", VISIBLE, address) == "True"
        assert output(hosts, 2, PYTHON, "-c", VISIBLE, address) == "False"


def test_traffic_is_counted_where_it_passes(hosts: Hosts) -> None:
    num_bytes = 3_000_000
    with receiver(hosts, 2):
        before = {n: hosts.bytes(n) for n in hosts.numbers}
        assert send(hosts, 1, "h2", num_bytes)[0] == num_bytes
        after = {n: hosts.bytes(n) for n in hosts.numbers}
    passed = {n: (after[n].rx - before[n].rx, after[n].tx - before[n].tx) for n in hosts.numbers}
    # A frame of 1514 bytes carries 1448 of them.
    assert 1.04 * num_bytes < passed[1][1] < 1.1 * num_bytes
    assert 1.04 * num_bytes < passed[2][0] < 1.1 * num_bytes
    assert max(passed[1][0], passed[2][1], *passed[3], *passed[4]) < 0.1 * num_bytes


@pytest.mark.parametrize("limited", [1, 2], ids=["the sender's", "the receiver's"])
def test_a_limited_link_takes_its_time(hosts: Hosts, limited: int) -> None:
    num_bytes = 4_000_000
    at_once = 64 * 1024  # the burst, which passes unhindered
    hosts.rate(limited, "100mbit")
    try:
        with receiver(hosts, 2):
            count, seconds = send(hosts, 1, "h2", num_bytes)
    finally:
        hosts.norate(limited)
    assert count == num_bytes
    assert seconds >= (num_bytes - at_once) / (100e6 / 8)


def test_a_cut_link_is_silent_until_it_is_healed(hosts: Hosts) -> None:
    with receiver(hosts, 2):
        hosts.cut(2)
        try:
            cut = hosts.run(
                1, [PYTHON, "-c", SEND.replace("timeout=20", "timeout=1"), "h2", "1"], deadline_s=20
            )
        finally:
            hosts.heal(2)
        assert cut.returncode != 0
        assert "timed out" in cut.stderr or "No route to host" in cut.stderr, cut.output
        assert send(hosts, 1, "h2", 1000)[0] == 1000


def test_mpirun_starts_ranks_on_hosts_of_different_sizes(hosts: Hosts) -> None:
    program = """
import os, socket
from mpi4py import MPI
comm = MPI.COMM_WORLD
here = (socket.gethostname(), os.environ["COLOUR"], os.environ["TMPDIR"])
names = comm.gather(here)
if comm.rank == 0:
    print(names)
"""
    line = mpirun([3, 1], ["-c", program], env=["COLOUR"])
    job = hosts.run(1, line, deadline_s=60, env={"COLOUR": "blue"})
    assert job.returncode == 0, job.output
    expected = [(host, "blue", "/run/tmp") for host in ("h1", "h1", "h1", "h2")]
    assert job.stdout.strip() == str(expected)


def test_what_a_command_started_on_other_hosts_ends_with_it(hosts: Hosts) -> None:
    with hosts.start(1, ["ssh", "h2", "echo here; sleep 12345"]) as process:
        assert process.stdout.readline() == "here\n"
        assert hosts.pids(1, "sleep 12345")
        assert hosts.pids(2, "sleep 12345")
    deadline = Deadline(SECOND_S)
    while hosts.pids(1, "sleep 12345") or hosts.pids(2, "sleep 12345"):
        assert not deadline.passed(), "a command outlived the one that started it"
        time.sleep(0.02)


def test_hosts_die_and_come_back(emulated: None) -> None:
    with Hosts(2) as hosts, receiver(hosts, 1):
        hosts.kill(2)
        assert not hosts.is_up(2)
        refused = hosts.run(1, ["ssh", "h2", "true"], deadline_s=SECOND_S)
        assert "Connection refused" in refused.stderr
        hosts.boot(2)
        assert send(hosts, 2, "h1", 1000)[0] == 1000
        hosts.poweroff(2)
        silent = hosts.run(1, ["ssh", "-o", "ConnectTimeout=1", "h2", "true"], deadline_s=SECOND_S)
        assert "timed out" in silent.stderr or "No route to host" in silent.stderr, silent.output
        hosts.boot(2)
        assert send(hosts, 2, "h1", 1000)[0] == 1000


def namespaces(pid: int | str) -> set[str]:
    """The namespaces that a process is in; none if it is gone."""
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/ns").iterdir():
            found.add(os.readlink(link))
    return found


def inhabited() -> set[str]:
    """The namespaces of all processes."""
    return set().union(*(namespaces(p.name) for p in Path("/proc").glob("[0-9]*")))


def made_for(pids: list[int]) -> set[str]:
    """The namespaces of some processes that are not this one's."""
    return set().union(*map(namespaces, pids)) - namespaces("self")


def named_things() -> dict[str, str]:
    """What hosts could leave behind outside of processes."""
    commands = (["ip", "netns"], ["ip", "-brief", "link"], ["ip", "route", "show", "table", "all"])
    seen = {
        " ".join(c): subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands
    }
    return seen | {"mounts": Path("/proc/self/mounts").read_text(), "hostname": os.uname().nodename}


def test_two_sets_of_hosts_are_separate_and_leave_nothing(emulated: None) -> None:
    names = named_things()
    with Hosts(2) as one, Hosts(2) as other:
        with receiver(one, 2):
            assert send(one, 1, "h2", 1000)[0] == 1000
            refused = other.run(1, [PYTHON, "-c", SEND, "h2", "1"], deadline_s=SECOND_S)
            assert "refused" in refused.stderr, refused.output
        made = made_for([pid for hosts in (one, other) for n in hosts.numbers for pid in hosts.pids(n)])
        assert len(made) == 4 * 5
    assert inhabited() & made == set()
    assert named_things() == names


def test_hosts_do_not_outlive_their_creator(emulated: None) -> None:
    """Not even one that had no time to clean up, nor what ran on them."""
    program = """
import sys, time
from tests.cluster.hosts import Hosts
with Hosts(2) as hosts, hosts.start(1, ["ssh", "h2", "echo here; sleep 54321"]) as process:
    process.stdout.readline()
    print(*hosts.pids(1), *hosts.pids(2), flush=True)
    process.wait()
"""
    names = named_things()
    with subprocess.Popen([PYTHON, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        pids = [int(pid) for pid in maker.stdout.readline().split()]
        made = made_for(pids)
        assert len(made) == 2 * 5
        maker.send_signal(signal.SIGKILL)
    deadline = Deadline(SECOND_S)
    while inhabited() & made or any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert not deadline.passed(), "hosts outlived the process that made them"
        time.sleep(0.02)
    assert named_things() == names
