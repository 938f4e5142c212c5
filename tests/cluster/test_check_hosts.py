"""`--check-hosts` on real hosts, one of them broken in a way of its own each time: it is named, with the
remedy, within 10 s, and the others are found well."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvd_train.launching.check_hosts.finding import CHECKS
from tests.cluster.hosts import Hosts
from tests.deadlines import seconds
from tests.launching import BIN, ROOT, Job, tool

pytestmark = pytest.mark.cluster

LIMIT_S = 10.0
PACKAGE = ROOT / "hvd_train" / "__init__.py"
VERSION = ROOT / "hvd_train" / "_version.py"

CHECK = """
import sys
from hvd_train.cli import main
status = main(["launch", "--check-hosts", *sys.argv[1:]])
assert not {"torch", "mpi4py", "h5py"} & set(sys.modules)
sys.exit(status)
"""


def check(hosts: Hosts, which: str, runs: Path, *options: str) -> Job:
    line = [sys.executable, "-c", CHECK, "--hosts", which, *options, "--", "--runs", str(runs)]
    job = hosts.run(1, line, deadline_s=3 * LIMIT_S)
    assert job.stderr == ""
    assert job.seconds < seconds(LIMIT_S), job.output
    return job


def rows(job: Job) -> dict[str, dict[str, str]]:
    """The table's cells, by host and check."""
    head, *lines = job.stdout.partition("\n\n")[0].splitlines()
    assert head.split() == ["host", *CHECKS]
    starts = [0] + [
        head.index(f" {name} ".rstrip() if name == CHECKS[-1] else f" {name} ") for name in CHECKS
    ]
    ends = [*starts[1:], None]
    table = [[line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines]
    return {host: dict(zip(CHECKS, cells, strict=True)) for host, *cells in table}


def call(hosts: Hosts, host: int, *argv: str) -> str:
    job = hosts.run(host, argv, deadline_s=LIMIT_S)
    assert job.returncode == 0, job.output
    return job.stdout


@contextmanager
def mounted(hosts: Hosts, host: int, *options: str) -> Iterator[None]:
    """Something else at a path, the last of the options of mount, on one host alone."""
    call(hosts, host, "mount", *options)
    try:
        yield
    finally:
        call(hosts, host, "umount", options[-1])


def other_file(hosts: Hosts, host: int, path: Path, text: str, folder: Path) -> AbstractContextManager[None]:
    """Another text in a file, on one host alone."""
    other = folder / "other"
    other.write_text(text)
    other.chmod(path.stat().st_mode)
    return mounted(hosts, host, "--bind", str(other), str(path.resolve()))


@contextmanager
def no_sshd(hosts: Hosts, folder: Path) -> Iterator[None]:
    hosts.signal(2, "sshd", signal.SIGKILL)
    try:
        yield
    finally:
        hosts.kill(2)
        hosts.boot(2)


@contextmanager
def stuck_sshd(hosts: Hosts, folder: Path) -> Iterator[None]:
    hosts.signal(2, "sshd", signal.SIGSTOP)
    try:
        yield
    finally:
        hosts.signal(2, "sshd", signal.SIGCONT)


@contextmanager
def cut(hosts: Hosts, folder: Path) -> Iterator[None]:
    hosts.cut(2)
    try:
        yield
    finally:
        hosts.heal(2)


def no_login(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    return mounted(hosts, 2, "--bind", "/dev/null", "/etc/ssh/authorized_keys")


@contextmanager
def unknown_key(hosts: Hosts, folder: Path) -> Iterator[None]:
    file = "/etc/ssh/ssh_known_hosts"
    known = folder / "known_hosts"
    known.write_text(call(hosts, 1, "cat", file).replace("*", "h3", 1))
    with mounted(hosts, 1, "--bind", str(known), file):
        yield


def no_python(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    return mounted(hosts, 2, "-t", "tmpfs", "none", str(BIN))


def other_version(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    text = re.sub(r'__version__ = ".*"', '__version__ = "0.0.9"', VERSION.read_text())
    return other_file(hosts, 2, VERSION, text, folder)


def hanging_package(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    return other_file(hosts, 2, PACKAGE, "import signal\nsignal.pause()\n", folder)


def other_mpi(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    return other_file(hosts, 2, Path(tool("mpirun")), "#!/bin/sh\necho 'mpirun (Open MPI) 3.1.6'\n", folder)


def other_runs(hosts: Hosts, folder: Path) -> AbstractContextManager[None]:
    return mounted(hosts, 2, "-t", "tmpfs", "none", str(folder / "runs"))


@contextmanager
def runs_for_reading(hosts: Hosts, folder: Path) -> Iterator[None]:
    runs = str(folder / "runs")
    with mounted(hosts, 2, "--bind", runs, runs):
        call(hosts, 2, "mount", "-o", "remount,ro,bind", runs)
        yield


@contextmanager
def firewall(hosts: Hosts, folder: Path) -> Iterator[None]:
    """This host's answers reach h2 from ssh alone, as where a firewall drops the rest."""
    to_h2 = ("to", call(hosts, 1, "getent", "hosts", "h2").split()[0], "ipproto", "tcp")
    rules = [("pref", "10", *to_h2, "dport", "22", "lookup", "main"), ("pref", "11", *to_h2, "blackhole")]
    with ExitStack() as stack:
        for rule in rules:
            call(hosts, 1, "ip", "rule", "add", *rule)
            stack.callback(call, hosts, 1, "ip", "rule", "del", *rule)
        yield


@dataclass(frozen=True)
class Broken:
    """A way in which h2 is broken, and what is said of it."""

    break_it: Callable[[Hosts, Path], AbstractContextManager[None]]
    check: str
    cell: str
    says: tuple[str, ...]


BROKEN = (
    Broken(no_sshd, "ssh", "refused", ("port 22 refuses", "Start sshd")),
    Broken(stuck_sshd, "ssh", "silent", ("timed out", "Restart sshd on h2")),
    Broken(no_login, "ssh", "denied", ("Permission denied", "`ssh-copy-id h2`")),
    Broken(unknown_key, "ssh", "host key", ("Host key verification failed", "`ssh h2`")),
    Broken(cut, "reachable", "", ("port 22", "its link are up")),
    Broken(no_python, "python", "absent", (f"{BIN}/", "same path", "Set up the same environment")),
    Broken(other_version, "package", "0.0.9", ("hvd_train is 0.0.9", "Install the same version")),
    Broken(hanging_package, "package", "silent", ("no answer within", "import hvd_train")),
    Broken(other_mpi, "mpi", "3.1.6", ("is of Open MPI 3.1.6", "Install the same version")),
    Broken(other_runs, "runs", "not shared", ("is not seen there", "Mount the same file system on h2")),
    Broken(runs_for_reading, "runs", "read-only", ("cannot be written", "Mount the same file system on h2")),
    Broken(firewall, "port", "blocked", ("timed out", "firewalls")),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.break_it.__name__)
def test_the_broken_host_is_named_with_the_remedy(hosts: Hosts, tmp_path: Path, broken: Broken) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with broken.break_it(hosts, tmp_path):
        job = check(hosts, "h1:1,h2:1,h3:1", runs)
    assert job.returncode == 1, job.output
    (line,) = (line for line in job.stdout.splitlines() if line.startswith("h2: "))
    assert line.startswith(f"h2: {broken.check}: ")
    assert "expected" in line
    assert [text for text in broken.says if text not in line] == [], line
    table = rows(job)
    assert broken.cell in table["h2"][broken.check]
    assert set(table["h3"].values()) == {"ok"}, job.output
    before = CHECKS[: CHECKS.index(broken.check)]
    assert all(table["h2"][name] in ("ok", "-") for name in before)
    assert job.stdout.endswith("3 hosts checked, 1 failed: h2.\n")
    assert list(runs.iterdir()) == []


def test_an_unknown_host_name(hosts: Hosts, tmp_path: Path) -> None:
    """And where no MPI starts the ranks."""
    job = check(hosts, "h1:1,nonesuch:1,h3:1", tmp_path, "--launcher", "horovodrun", "--gloo")
    assert job.returncode == 1, job.output
    assert rows(job)["nonesuch"] == dict.fromkeys(CHECKS, "-") | {"resolves": "unknown"}
    assert "\nnonesuch: resolves: no address is known here for nonesuch: " in job.stdout
    assert set(rows(job)["h3"].values()) == {"ok"}


def test_four_healthy_hosts(hosts: Hosts, tmp_path: Path) -> None:
    """By name and by address; one is warned of."""
    cores = len(os.sched_getaffinity(0))
    job = check(hosts, f"h1:1,h2:1,10.99.0.3:1,h4:{cores + 1}", tmp_path / "runs")
    assert job.returncode == 0, job.output
    table = rows(job)
    assert table["h1"] == dict.fromkeys(CHECKS, "ok") | dict.fromkeys(
        ("resolves", "reachable", "ssh"), "here"
    )
    assert table["h2"] == table["10.99.0.3"] == dict.fromkeys(CHECKS, "ok")
    assert table["h4"] == table["h2"] | {"cores": f"{cores} < {cores + 1}"}
    assert f"warning: h4: cores: {cores + 1} slots on {cores} cores; " in job.stdout
    assert f"Give it fewer slots: h4:{cores}.\n" in job.stdout
    assert "\nh2, 10.99.0.3, h4 connected from eth0 there to 10.99.0.1 (eth0) here.\n" in job.stdout
    assert job.stdout.endswith("4 hosts checked, none failed.\n")
    assert not (tmp_path / "runs").exists()
