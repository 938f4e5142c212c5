"""Starts real multi-rank jobs, each with a deadline, and leaves nothing of them behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvd_train.environment import mpi_build
from hvd_train.environment.mpi_launcher import identify
from tests.deadlines import Deadline

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


MARK = "HVD_TRAIN_TEST_JOB"
"""An environment variable that all processes of one job inherit, whatever session they put themselves in."""


class Process(subprocess.Popen[str]):
    """A running command whose whole family can be found by its mark."""

    def __init__(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.mark = f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
        super().__init__(
            list(argv),
            cwd=cwd,
            env={**env, MARK: self.mark.partition("=")[2]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the interpreter's own tools first on the PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    return env | (AS_ROOT if os.getuid() == 0 else {}) | dict(extra or {})


def suite(path: str) -> list[str]:
    """The arguments of Python by which each rank of a job runs the tests of a file."""
    return ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--color=no", "--tb=short", path]


def command(launcher: str, ranks: int, program: Sequence[str]) -> list[str]:
    """The line that starts `program` (arguments of Python) on so many ranks of this machine."""
    python = [sys.executable, *program]
    if launcher == "python":
        return python
    if launcher == "mpirun":
        return [tool("mpirun"), *PLACEMENT[mpi_abi()], "-np", str(ranks), *python]
    place = ["-np", str(ranks), "-H", f"localhost:{ranks}"]
    return [*horovodrun(gloo=launcher == "horovodrun-gloo"), *place, *python]


PLACEMENT = {"openmpi": ("--oversubscribe", "--bind-to", "none"), "mpich": ()}
"""By MPI: what its mpirun must be told so that ranks may share cores and move among them; MPICH lets them."""


def horovodrun(gloo: bool) -> list[str]:
    """The beginning of its line; a test is skipped where it would take its mpirun for an unknown one."""
    if not gloo and not identify(tool("mpirun")).known_to_horovodrun:
        pytest.skip("horovodrun does not make out whose this mpirun is")
    return [tool("horovodrun"), *(["--gloo"] if gloo else [])]


def mpi_abi() -> str:
    """`openmpi` or `mpich`: which MPI the package was built for; Open MPI if none was there."""
    mpi = mpi_build.load().mpi
    return "openmpi" if mpi is None else mpi.abi


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
    test fails with what it had printed; so does one that leaves a process behind."""
    with start(argv, cwd=cwd, env=env) as process:
        began = time.monotonic()
        deadline = Deadline(deadline_s)
        while True:
            try:
                stdout, stderr = process.communicate(timeout=min(deadline_s, 5))
                break
            except subprocess.TimeoutExpired:
                if deadline.passed():
                    kill(process)
                    stdout, stderr = process.communicate()
                    pytest.fail(f"{deadline}: {' '.join(argv)}\n{stdout}\n{stderr}")
        seconds = time.monotonic() - began
        left = _outliving(process)
        assert not left, f"processes {left} outlived their job: {' '.join(argv)}\n{stdout}\n{stderr}"
        return Job(process.returncode, stdout, stderr, seconds)


@contextlib.contextmanager
def start(
    argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """A running command, killed with all that it started when the block ends."""
    process = Process(argv, cwd or ROOT, environment({"PYTHONPATH": str(ROOT), **(env or {})}))
    try:
        yield process
    finally:
        kill(process)


def wait_for(what: Callable[[], bool], deadline_s: float, process: Process) -> None:
    """Until something is so. The test fails, with what the job has printed, once that has taken too long or
    the job has ended."""
    deadline = Deadline(deadline_s)
    while not what():
        if deadline.passed() or process.poll() is not None:
            status = process.poll()
            kill(process)
            pytest.fail(f"it did not happen; {status}\n{process.communicate()}")
        time.sleep(0.05)


def _environ(pid: int) -> str:
    try:
        items = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return ""
    return next((i for i in items if i.startswith(f"{MARK}=")), "")


def members(mark: str) -> list[int]:
    """Living processes that carry the mark of a job."""
    pids = (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit())
    return [pid for pid in pids if mark and _environ(pid) == mark]


def command_line(pid: int) -> list[str]:
    """What a process was started with; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def is_rank(pid: int) -> bool:
    """Whether a process is `python -m hvd_train`, and has not ended."""
    line = command_line(pid)
    return line[1:3] == ["-m", "hvd_train"] and line[3:4] != ["launch"]


def ranks_of(process: Process) -> list[int]:
    """Those of a job, in ascending order."""
    return sorted(filter(is_rank, members(process.mark)))


def send(pids: Iterable[int], number: int) -> None:
    """Sends a signal to processes. One may end before it is reached: a launcher ends the ranks of a job of
    which one has been killed."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def assert_nothing_is_left(process: Process, within_s: float) -> None:
    """That all processes of a job have ended: on emulated hosts those that were started there by ssh, too."""
    deadline = Deadline(within_s)
    while members(process.mark) and not deadline.passed():
        time.sleep(0.05)
    left = {pid: " ".join(command_line(pid)) for pid in members(process.mark)}
    assert not left


def _outliving(process: Process) -> list[int]:
    """Processes of the job that are still there 5 s after its first one ended."""
    deadline = Deadline(5)
    while members(process.mark) and not deadline.passed():
        time.sleep(0.05)
    return members(process.mark)


def kill(process: Process) -> None:
    """SIGKILL to every process of the job."""
    send(members(process.mark), signal.SIGKILL)
    process.wait()
