"""The way to a host: its name, its ssh, and a probe there. Each step has a limit of time."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Generic, NamedTuple, TypeVar, cast

from hvd_train.launching.check_hosts import probe
from hvd_train.launching.check_hosts.finding import CheckFailed, Finding
from hvd_train.launching.check_hosts.probe import Facts, ProbeRequest
from hvd_train.launching.network import is_this_host

T = TypeVar("T")

CONNECT_S = 3
"""For a name, for a connection, and for ssh's own connection, each, in seconds."""

_CONFIGURATION_S = 2

_SSH_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_S),
    "LogLevel": "ERROR",
    # A connection that later ones share would stay open in the background, with this process's pipes.
    "ControlMaster": "no",
}

_SSH_SAYS = (
    # Part of its output, a word for it, what to do.
    (
        "IDENTIFICATION HAS CHANGED",
        "host key",
        "If {host} was set up anew, `ssh-keygen -R {host}`, then log in once by hand and confirm its key",
    ),
    (
        "Host key verification failed",
        "host key",
        "Log in once by hand, `ssh {host}`, and confirm its key, or collect it: "
        "`ssh-keyscan {host} >> ~/.ssh/known_hosts`",
    ),
    (
        "Permission denied",
        "denied",
        "Install your key: `ssh-copy-id {host}`; load a key that has a passphrase: `ssh-add`",
    ),
    ("timed out", "silent", "Restart sshd on {host}, or find out what keeps that host busy"),
)


class _Way(NamedTuple):
    """Where ssh would connect to."""

    hostname: str
    port: int


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe reported."""

    facts: Facts
    """Those that it reached."""
    asked: float
    """This host's clock before, in seconds since 1970."""
    answered: float
    """And after."""
    home: str
    """This host's address on the way there."""
    end: str
    """How it ended, in words, where facts are missing."""


def probe_host(name: str, python: str, request: ProbeRequest, deadline: float) -> ProbeResult | None:
    """Logs in to a host and runs the probe there; None if the name is this host's own.

    Args:
        python: the interpreter's path.
        deadline: by `time.monotonic`; it returns a moment later at most.

    Raises `CheckFailed`.
    """
    if name in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return None
    way = _way(name)
    addresses = _resolve(name, way)
    if any(is_this_host(address[0]) for _, address in addresses):
        return None
    home = _reach(way, addresses)
    return _probe(name, python, {**request, "home": home}, deadline)


def _way(name: str) -> _Way:
    """The user's and the system's ssh configuration decide it."""
    try:
        asked = subprocess.run(
            ["ssh", "-G", "--", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CONFIGURATION_S,
            check=False,
        )
    except OSError:
        raise CheckFailed(
            "ssh",
            Finding(
                cell="absent",
                seen="there is no program ssh on this host's PATH",
                expected="OpenSSH's client",
                remedy="Install openssh-client here",
            ),
        ) from None
    except subprocess.TimeoutExpired:
        return _Way(name, 22)
    said = dict(line.partition(" ")[::2] for line in asked.stdout.splitlines())
    return _Way(said.get("hostname", name), int(said.get("port", "22")))


def _resolve(name: str, way: _Way) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """The addresses, each once."""
    try:
        found = _within(
            CONNECT_S, lambda: socket.getaddrinfo(way.hostname, way.port, type=socket.SOCK_STREAM)
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        alias = "" if way.hostname == name else f" ({name} in ssh's configuration)"
        raise CheckFailed(
            "resolves",
            Finding(
                cell="unknown",
                seen=f"no address is known here for {way.hostname}{alias}: {reason}",
                expected="a name in DNS or /etc/hosts",
                remedy="Correct the name, add it to /etc/hosts on each host, or give the address instead",
            ),
        ) from None
    return list(dict.fromkeys((family, cast("tuple[str, int]", address)) for family, *_, address in found))


class _Within(threading.Thread, Generic[T]):
    """A thread that the program does not wait for, as the resolution of a name cannot be cancelled."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.result: list[T] = []
        self.error: list[OSError | UnicodeError] = []

    def run(self) -> None:
        try:
            self.result.append(self._function())
        except (OSError, UnicodeError) as error:
            self.error.append(error)


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Its result; raises `TimeoutError`, or the `OSError` or `UnicodeError` that it raised."""
    thread = _Within(function)
    thread.start()
    thread.join(seconds)
    if thread.error:
        raise thread.error[0]
    if not thread.result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return thread.result[0]


def _reach(way: _Way, addresses: Sequence[tuple[socket.AddressFamily, tuple[str, int]]]) -> str:
    """This host's address in a connection to the other's sshd."""
    timeout_s = CONNECT_S / len(addresses)
    for family, address in addresses:
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_s)
            try:
                link.connect(address)
            except OSError as error:
                failure = error
                continue
            return str(link.getsockname()[0])
    where = f"{address[0]}, port {way.port}"
    if isinstance(failure, ConnectionRefusedError):
        raise CheckFailed(
            "ssh",
            Finding(
                cell="refused",
                seen=f"{where} refuses a connection",
                expected="its sshd there",
                remedy="Start sshd on that host (`systemctl start ssh`, or `sshd`), or set its port in "
                "~/.ssh/config here",
            ),
        )
    silent = isinstance(failure, TimeoutError)
    reason = f"no answer within {timeout_s:g} s" if silent else failure.strerror
    raise CheckFailed(
        "reachable",
        Finding(
            cell="silent" if silent else "no route",
            seen=f"{where}: {reason}",
            expected="a connection",
            remedy="Check that this host and its link are up (`ip link` there), and that no firewall drops "
            "the port; or leave it out of the hosts",
        ),
    )


def _probe(name: str, python: str, request: ProbeRequest, deadline: float) -> ProbeResult:
    source = (
        resources.files("hvd_train.launching.check_hosts").joinpath("probe.py").read_text(encoding="utf-8")
    )
    program = f"{source}\nmain({json.dumps(request)!r})\n".encode()
    options = [word for option in _SSH_OPTIONS.items() for word in ("-o", "=".join(option))]
    timeout_s = max(1.0, deadline - time.monotonic())
    asked = time.time()
    try:
        done = subprocess.run(
            ["ssh", "-T", *options, "--", name, f"{shlex.quote(python)} -"],
            input=program,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        status, out, err = done.returncode, done.stdout, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as late:
        status, out, err = None, late.stdout or b"", f"no answer within {timeout_s:.0f} s"
    answered = time.time()
    facts = parse_facts(out.decode(errors="replace"))
    reason = err.strip().rpartition("\n")[2].strip(" .\r")
    if not facts:
        raise _no_facts(name, python, status, err, reason)
    end = reason if status is None else f"the probe ended with status {status}: {reason}"
    return ProbeResult(facts=facts, asked=asked, answered=answered, home=request["home"], end=end)


def parse_facts(out: str) -> Facts:
    """The facts in what a host printed."""
    whole = out.split("\n")[:-1]  # the last line is empty, or was cut off
    lines = (line.removeprefix(probe.MARK) for line in whole if line.startswith(probe.MARK))
    return cast("Facts", dict(json.loads(line) for line in lines))


def _no_facts(name: str, python: str, status: int | None, err: str, reason: str) -> CheckFailed:
    """Why a probe reported nothing."""
    if status is None:
        return CheckFailed(
            "ssh",
            Finding(
                cell="silent",
                seen=f"{err} to a login that starts {python}",
                expected="one within a second or two",
                remedy=f"Try both by hand: `ssh {name}`, then `{shlex.quote(python)} --version`; the one "
                "that hangs waits for a file system or a directory service",
            ),
        )
    if status == 255:
        return CheckFailed("ssh", _ssh_finding(name, err, reason))
    if status in (126, 127) or re.search("not found|No such file", err):
        return CheckFailed(
            "python",
            Finding(
                cell="absent",
                seen=f"{python} cannot be started there ({reason})",
                expected="the interpreter of this host at the same path",
                remedy="Set up the same environment at this path on that host, or keep it in a folder that "
                "all hosts share",
            ),
        )
    return CheckFailed(
        "python",
        Finding(
            cell="failed",
            seen=f"{python} ended there with status {status}: {reason}",
            expected="the interpreter of this host",
            remedy=f"Try it by hand: `ssh {name} {shlex.quote(python)} --version`",
        ),
    )


def _ssh_finding(name: str, err: str, reason: str) -> Finding:
    cell, remedy = "failed", "Try it by hand: `ssh -o BatchMode=yes {host} true`"
    for text, word, advice in _SSH_SAYS:
        if text in err:
            cell, remedy = word, advice
            break
    return Finding(
        cell=cell,
        seen=f"ssh printed: {reason or 'nothing'}",
        expected="a login without a question",
        remedy=remedy.format(host=name),
    )
