"""Hosts h1, h2, ... on one machine: each has its own network, name, /dev/shm, /run, System V memory and
processes, and an sshd that lets the others in; the file system is shared. Needs root.

A host is a process (init.py) in namespaces of its own, with one link to a switch. Nothing of it has a name on
the machine: the networks live as long as a file descriptor of this process, the hosts as long as a pipe from
it, and their files lie in memory. However this process ends, the kernel takes all of it; and the hosts of two
processes cannot meet.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import IO, NamedTuple

from typing_extensions import Self

from tests import launching
from tests.deadlines import Deadline
from tests.launching import MARK, Job, Process

TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "sshd")

HOST_ENV = {"TMPDIR": "/run/tmp", "OMPI_MCA_mpi_yield_when_idle": "1"}
"""What processes on a host find in their environment. An MPI names its folder by host and process number, and
those of another test on this machine may be the same. Nor does it know that the hosts share their cores:
without yielding while it waits, an allreduce was seen to take 30 times as long."""

_INIT = str(Path(__file__).with_name("init.py"))
_BOOT_TIMEOUT_S = 60.0


_SSH = """
Host *
    IdentityFile /etc/ssh/key
    UserKnownHostsFile none
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 5
    SendEnv {mark}
"""

_SSHD = """
ListenAddress {address}:22
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
AcceptEnv {mark}
SetEnv {env}
"""


def missing() -> str:
    """Why this machine cannot emulate hosts; empty if it can."""
    if os.getuid() != 0:
        return "hosts are emulated by root only"
    absent = [tool for tool in TOOLS if _which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: install iproute2, util-linux and openssh-server"
    probe = subprocess.run([*_UNSHARE, "--net", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces can be made here: {probe.stderr.strip()}" if probe.returncode else ""


_UNSHARE = ("unshare", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child")


def _which(tool: str) -> str | None:
    # sshd insists on its absolute path, and a user's PATH often lacks the folder that it is in.
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _call(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Traffic(NamedTuple):
    """Bytes that have passed a host's eth0 since the hosts were made, headers included."""

    rx: int
    tx: int


class _Network:
    """A network namespace, which lives as long as this object's file descriptor."""

    def __init__(self) -> None:
        with subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            print(file=holder.stdin, flush=True)
            holder.stdout.readline()  # type: ignore[union-attr]  # once cat answers, unshare has done its work
            self._fd = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.ip("link", "set", "lo", "up")

    def call(self, *argv: str) -> str:
        """Runs a command in it."""
        return _call("nsenter", f"--net={self.path}", *argv)

    def ip(self, *arguments: str) -> str:
        return self.call("ip", *arguments)

    def close(self) -> None:
        os.close(self._fd)


class _Keys(NamedTuple):
    """One pair serves all hosts, as their own key and as that of who logs in."""

    private: str
    public: str

    @classmethod
    def generate(cls) -> _Keys:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "key"
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file))
            return cls(file.read_text(), file.with_suffix(".pub").read_text())


_NETWORK = "10.99.0.0/24"


def _address(number: int) -> str:
    return f"10.99.0.{number}"


def _files(number: int, numbers: Sequence[int], keys: _Keys) -> dict[str, str]:
    """The private files of a host: path and text."""
    names = [f"{_address(n)} h{n}\n" for n in numbers]
    return {
        "/run/hosts": "127.0.0.1 localhost\n" + "".join(names),
        "/etc/ssh/key": keys.private,
        "/etc/ssh/authorized_keys": keys.public,
        "/etc/ssh/ssh_known_hosts": f"* {keys.public}",
        "/etc/ssh/ssh_config": _SSH.format(mark=MARK),
        "/etc/ssh/sshd_config": _SSHD.format(
            address=_address(number), mark=MARK, env=" ".join(f"{k}={v}" for k, v in HOST_ENV.items())
        ),
    }


class _Host:
    """One host; `number` counts from 1."""

    def __init__(self, number: int, network: _Network, files: Mapping[str, str], log: IO[str]) -> None:
        self.name, self.address = f"h{number}", _address(number)
        self.network = network
        self.pid = 0
        """Of its process 1, as seen from outside; 0 while it is down."""
        self._files = dict(files)
        self._process: subprocess.Popen[str] | None = None
        self._log = log

    def boot(self) -> None:
        """Starts it; `wait_until_up` waits."""
        self._process = subprocess.Popen(
            ["nsenter", f"--net={self.network.path}", *_UNSHARE, sys.executable, _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=launching.environment(HOST_ENV),
        )
        told = {"name": self.name, "address": self.address, "sshd": _which("sshd"), "files": self._files}
        print(json.dumps(told), file=self._process.stdin, flush=True)

    def wait_until_up(self) -> None:
        ready, _, _ = select.select([self._process.stdout], [], [], _BOOT_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} did not come up:\n{self._log.read()}")
        self.pid = int(line)

    def kill(self) -> None:
        """Returns when all its processes are gone."""
        if self._process is None:
            return
        # What started process 1 ends once that is reaped, before which the kernel takes all the others.
        launching.send([self.pid or self._process.pid], SIGKILL)
        self._process.communicate()
        self._process, self.pid = None, 0

    def close(self) -> None:
        self.kill()
        self.network.close()


class Hosts:
    """`count` hosts that are up. A host is named by its number, from 1, or `h1` among themselves."""

    def __init__(self, count: int) -> None:
        self.numbers = range(1, count + 1)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            keys = _Keys.generate()
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._switch = _Network()
            stack.callback(self._switch.close)
            self._switch.ip("link", "add", "switch", "type", "bridge")
            self._switch.ip("link", "set", "switch", "up")
            self._hosts = {}
            for number in self.numbers:
                host = self._hosts[number] = _Host(
                    number, _Network(), _files(number, self.numbers, keys), log
                )
                stack.callback(host.close)
                self._plug_in(number)
                host.boot()
            for host in self._hosts.values():
                host.wait_until_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _plug_in(self, number: int) -> None:
        network, port = self._hosts[number].network, f"port{number}"
        peer = ("type", "veth", "peer", "name", "eth0", "netns", network.path)
        self._switch.ip("link", "add", port, *peer)
        self._switch.ip("link", "set", port, "master", "switch", "up")
        network.ip("address", "add", f"{_address(number)}/24", "dev", "eth0")
        network.ip("link", "set", "eth0", "up")
        # Linux's own choice, whatever this machine's is: each is another network. The route it is, since a
        # namespace may not choose for itself.
        network.ip("route", "replace", _NETWORK, "dev", "eth0", "congctl", "cubic")

    def enter(self, host: int, argv: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The line that runs a command on a host."""
        kinds = ("--net", "--uts", "--mount", "--ipc", "--pid")
        inside = ["env", "-C", str(cwd or launching.ROOT), *argv]  # a working directory does not come along
        return ["nsenter", "--target", str(self._hosts[host].pid), *kinds, *inside]

    def run(
        self,
        host: int,
        argv: Sequence[str],
        *,
        deadline_s: float,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """As `launching.run`, on a host."""
        return launching.run(
            self.enter(host, argv, cwd), deadline_s=deadline_s, cwd=cwd, env={**HOST_ENV, **(env or {})}
        )

    @contextmanager
    def start(
        self, host: int, argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Iterator[Process]:
        """As `launching.start`, on a host. What it started on other hosts by ssh ends with it."""
        line = self.enter(host, argv, cwd)
        with launching.start(line, cwd=cwd, env={**HOST_ENV, **(env or {})}) as process:
            yield process

    def rate(self, host: int, rate: str, burst: str = "64kb") -> None:
        """Limits a host's link, each way, to a rate in the words of tc, such as `100mbit`. That of `1gbit` is
        kept to with a `burst` of `512kb`."""
        shape = ("root", "tbf", "rate", rate, "burst", burst, "latency", "100ms")
        for network, device in self._ends(host):
            network.call("tc", "qdisc", "replace", "dev", device, *shape)

    def norate(self, host: int) -> None:
        """Takes the limit away."""
        for network, device in self._ends(host):
            network.call("tc", "qdisc", "del", "dev", device, "root")

    def _ends(self, host: int) -> tuple[tuple[_Network, str], ...]:
        return (self._hosts[host].network, "eth0"), (self._switch, f"port{host}")

    def bytes(self, host: int) -> Traffic:
        """What has passed the host's eth0."""
        (link,) = json.loads(self._hosts[host].network.ip("-json", "-statistics", "link", "show", "eth0"))
        return Traffic(link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"])

    def cut(self, host: int) -> None:
        """Pulls the host's cable: its peers see silence."""
        self._switch.ip("link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """Puts the cable back; packets pass when this returns."""
        port, deadline = f"port{host}", Deadline(30)
        self._switch.ip("link", "set", port, "up")
        while self._state(port) != "forwarding":
            if deadline.passed():
                raise RuntimeError(f"{port} is {self._state(port)} after 30 s; expected forwarding")
            time.sleep(0.02)
        for other in self._hosts.values():  # or those that were out of reach are taken to be so for a while
            other.network.ip("neigh", "flush", "dev", "eth0")

    def _state(self, port: str) -> str:
        (link,) = json.loads(self._switch.ip("-json", "-details", "link", "show", port))
        state: str = link["linkinfo"]["info_slave_data"]["state"]
        return state

    def kill(self, host: int) -> None:
        """SIGKILL to all processes of a host at once: the kernel ends their connections, and peers notice."""
        self._hosts[host].kill()

    def poweroff(self, host: int) -> None:
        """The same with the cable pulled first: peers see silence."""
        self.cut(host)
        self.kill(host)

    def boot(self, host: int) -> None:
        """Brings a host up again."""
        self.heal(host)
        self._hosts[host].boot()
        self._hosts[host].wait_until_up()

    def is_up(self, host: int) -> bool:
        return self._hosts[host].pid != 0

    def file(self, host: int, path: str) -> Path:
        """A file of a host that is up, its private ones included, as this process can open it."""
        return Path(f"/proc/{self._hosts[host].pid}/root{path}")

    def shared_memory(self, host: int) -> list[str]:
        """Names of the files in the host's /dev/shm."""
        return sorted(os.listdir(self.file(host, "/dev/shm")))

    def pids(self, host: int, pattern: str = "") -> list[int]:
        """Processes of a host whose command line matches a regular expression, by their numbers outside."""
        mine = os.readlink(f"/proc/{self._hosts[host].pid}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (process / "cmdline").read_text(errors="replace").replace("\0", " ")
                if os.readlink(process / "ns/pid") == mine and line and re.search(pattern, line):
                    found.append(int(process.name))
        return sorted(found)

    def signal(self, host: int, pattern: str, number: int) -> None:
        """Sends a signal to the processes that `pids` finds. One may end before it is reached."""
        launching.send(self.pids(host, pattern), number)


def placement(slots: Sequence[int]) -> str:
    """So many ranks on each of h1, h2, ..., as mpirun's --host and horovodrun's -H take it: `h1:3,h2:1`."""
    return ",".join(f"h{number}:{ranks}" for number, ranks in enumerate(slots, 1))


def mpirun(slots: Sequence[int], program: Sequence[str], *options: str, env: Iterable[str] = ()) -> list[str]:
    """The line that, on h1, starts `program` (arguments of Python) with slots[i] ranks on host i + 1.

    Args:
        options: more of mpirun's, such as `--with-ft`, `ulfm`.
        env: names of the variables that the ranks of all hosts get.
    """
    # Its absolute path tells the other hosts where it is installed.
    line = [launching.tool("mpirun"), "--host", placement(slots), "-np", str(sum(slots)), "--bind-to", "none"]
    exported = [word for name in ("PYTHONPATH", *env) for word in ("-x", name)]
    return [*line, *exported, *options, sys.executable, *program]
