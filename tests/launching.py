"""Starts real multi-rank jobs, each with a deadline, and leaves nothing of them behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

AS_ROOT = {
    f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1" for prefix in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")
}
"""Without these Open MPI refuses to start anything as root, as a container's user often is."""


@dataclass(frozen=True)
class Job:
    """A finished job."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Standard output, then standard error."""
        return self.stdout + self.stderr


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the interpreter's own tools first on the PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    return env | (AS_ROOT if os.getuid() == 0 else {}) | dict(extra or {})


def command(launcher: str, ranks: int, program: Sequence[str]) -> list[str]:
    """The line that starts `program` (arguments of Python) on so many ranks of this machine."""
    python = [sys.executable, *program]
    if launcher == "python":
        return python
    if launcher == "mpirun":
        return [tool("mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *python]
    kind = {"horovodrun": [], "horovodrun-gloo": ["--gloo"]}[launcher]
    return [tool("horovodrun"), *kind, "-np", str(ranks), "-H", f"localhost:{ranks}", *python]


def tool(name: str) -> str:
    """The path of a launcher; a test that needs one that is not installed is skipped."""
    path = shutil.which(name, path=environment()["PATH"])
    if path is None:
        pytest.skip(f"{name} is not installed: `make setup` installs it")
    return path


def run(
    argv: Sequence[str], *, deadline_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Job:
    """Runs a command to its end. One that passes its deadline is killed with all that it started, and the
    test fails with what it had printed."""
    with start(argv, cwd=cwd, env=env) as process:
        began = time.monotonic()
        try:
            stdout, stderr = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            kill(process)
            stdout, stderr = process.communicate()
            pytest.fail(f"still running after {deadline_s:g} s: {' '.join(argv)}\n{stdout}\n{stderr}")
        return Job(process.returncode, stdout, stderr, time.monotonic() - began)


@contextlib.contextmanager
def start(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A running command in a session of its own, killed with all that it started when the block ends."""
    process = subprocess.Popen(
        list(argv),
        cwd=cwd or ROOT,
        env=environment({"PYTHONPATH": str(ROOT), **(env or {})}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and every descendant: launchers put ranks into groups of their own."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, children first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
