"""What a host is like: facts that this file finds out where it is run, by `ssh HOST PYTHON -`.

Its source goes there through standard input, so it uses the standard library alone, and nothing that came
after Python 3.8: an interpreter of another version must get far enough to say which it is. Each fact is
printed as soon as it is known: one that hangs, as a file system whose server is gone, leaves those before it.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypedDict

MARK = "hvd_train probe:"
"""Begins each line of a fact, as a host may print other lines at a login."""

REPLY = b"hvd_train\n"
"""What the listener answers to the right token."""

_LIFE_S = 8
_MPIRUN_S = 3.0
_CALL_S = 2.0
_SIOCGIFADDR = 0x8915


class ProbeRequest(TypedDict):
    """What a probe is to check."""

    cwd: str
    path: list[str]
    """Folders of PYTHONPATH."""
    mpirun: str
    """Absolute path of the launcher; empty: there is none."""
    runs: str
    """Absolute path of the folder of the runs."""
    mark: str
    """Name of a file that was made in it."""
    home: str
    """Address to connect to; empty: none."""
    port: int
    token: str


class Answer(TypedDict):
    """What was found; or what went wrong, and `found` names it in a word for the table."""

    found: str
    wrong: str


class RecordedMPI(TypedDict):
    """The MPI library that the package there was built for; all empty if none was recorded."""

    version: str
    library: str
    there: bool


class Facts(TypedDict, total=False):
    """In the order in which they are found."""

    started: float
    """The clock when the probe began, in seconds since 1970."""
    python: str
    cores: int
    """That a process may run on."""
    package: Answer
    """Version of hvd_train."""
    torch: str
    """Its version, as its installer wrote it down; empty if there is none."""
    record: RecordedMPI
    mpirun: Answer
    """What it prints for --version."""
    home: Answer
    """Address and interface, with a space between, that the connection left from."""
    runs: Answer
    ended: float


def main(request: str) -> None:
    """Prints the facts, on a host that was logged in to for this alone."""
    signal.alarm(_LIFE_S)  # who asked has stopped waiting by then, and nothing else would end it
    asked: ProbeRequest = json.loads(request)
    # As a rank finds its modules: in the working directory, which the empty name at the front stands for, and
    # in PYTHONPATH.
    with suppress(OSError):
        os.chdir(asked["cwd"])
    sys.path[1:1] = asked["path"]
    for name, value in find(asked):
        print(MARK, json.dumps([name, value]), flush=True)


def find(request: ProbeRequest) -> Iterator[tuple[str, Any]]:
    """Names and values of `Facts`. What may hang comes last."""
    yield "started", time.time()
    yield "python", platform.python_version()
    yield "cores", len(os.sched_getaffinity(0))
    yield "package", _package()
    yield "torch", _torch()
    yield "record", _record()
    yield "mpirun", _mpirun(request["mpirun"])
    if request["home"]:
        yield "home", _call_home(request["home"], request["port"], request["token"])
    yield "runs", _runs(request["runs"], request["mark"])
    yield "ended", time.time()


def _package() -> Answer:
    try:
        package = importlib.import_module("hvd_train")
        return Answer(found=package.__version__, wrong="")
    except Exception as error:  # whatever is wrong with it is reported
        return Answer(found="absent", wrong=" ".join(f"{type(error).__name__}: {error}".split()))


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _record() -> RecordedMPI:
    package = sys.modules.get("hvd_train")
    file = os.path.join(os.path.dirname(getattr(package, "__file__", None) or ""), "_build.json")
    try:
        with open(file) as text:
            mpi = json.load(text)["mpi"]
        return RecordedMPI(
            version=mpi["version"], library=mpi["library"], there=os.path.exists(mpi["library"])
        )
    except (OSError, ValueError, LookupError, TypeError):  # it was not built, or without an MPI
        return RecordedMPI(version="", library="", there=False)


def _mpirun(program: str) -> Answer:
    if not program:
        return Answer(found="", wrong="")
    # mpirun gives its daemons these two.
    prefix = os.path.dirname(os.path.dirname(program))
    folders = {"PATH": "bin", "LD_LIBRARY_PATH": "lib"}
    paths = {name: f"{prefix}/{sub}:{os.environ.get(name, '')}" for name, sub in folders.items()}
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MPIRUN_S,
            check=False,
            env=dict(os.environ, **paths),
        )
    except OSError as error:
        return Answer(found="absent", wrong=error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return Answer(found="silent", wrong=f"no answer to --version within {_MPIRUN_S:g} s")
    return Answer(found=done.stdout.decode(errors="replace"), wrong="")


def _call_home(home: str, port: int, token: str) -> Answer:
    try:
        with socket.create_connection((home, port), timeout=_CALL_S) as peer:
            peer.sendall(f"{token}\n".encode())
            own = peer.getsockname()[0]
            reply = peer.recv(len(REPLY))
    except OSError as error:
        return Answer(found="blocked", wrong=error.strerror or str(error))
    if reply != REPLY:
        return Answer(found="blocked", wrong="another program answers there")
    return Answer(found=f"{own} {interface_of(own)}", wrong="")


def interface_of(address: str) -> str:
    """The interface of this host that has an IPv4 address as its first one; empty if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _runs(folder: str, mark: str) -> Answer:
    if not os.path.isdir(folder):
        return Answer(found="absent", wrong=f"there is no folder {folder}")
    if not os.path.exists(os.path.join(folder, mark)):
        return Answer(found="not shared", wrong=f"a file just made in {folder} here is not seen there")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        return Answer(found="read-only", wrong=f"{folder} cannot be written: {error.strerror}")
    return Answer(found="", wrong="")
