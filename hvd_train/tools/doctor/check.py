"""The result of one check, and the one way to run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hvd_train.errors import HvdTrainError

Status = Literal["ok", "warning", "error"]

_TIMEOUT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str

    status: Status = "ok"
    """`error`: what was started, or would be, cannot run. `warning`: it runs, but something that is often
    wanted does not, or it runs worse than it could."""

    seen: str

    remedy: str = ""
    """What to do; empty if all is well, or if `seen` states it."""

    alike: str = ""
    """What must be the same on every rank; empty where ranks may differ."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: `Check(**values)` takes them back."""
        return asdict(self)


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; one that raises is an error of this check and of nothing else."""
    try:
        return check()
    except HvdTrainError as error:
        return Check(name=name, status="error", seen=str(error))  # says what to do
    except Exception as error:
        return failed(name, f"the check raised {type(error).__name__}: {error}")


def failed(name: str, seen: str) -> Check:
    """The error of a check that has no result."""
    remedy = "This part was not checked. If a training works, this is a bug in doctor: report it."
    return Check(name=name, status="error", seen=seen, remedy=remedy)


def attempt_apart(name: str, check: Callable[[], Check]) -> Check:
    """As `attempt`, in a fork of this process, which the check may end."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writable, json.dumps(attempt(name, check).to_json()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not said:
        return failed(name, f"the check ended its process with {ended_by(os.waitstatus_to_exitcode(status))}")
    return Check(**json.loads(said))


def ended_by(code: int) -> str:
    """`exit code 1` or `SIGSEGV`, of a process's end as Python gives it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def ask(argv: Sequence[str]) -> str:
    """What a program prints on both streams, whatever its exit code.

    Raises `OSError` if it cannot be started, `subprocess.TimeoutExpired` if it does not end in 15 s.
    """
    asked = subprocess.run(
        list(argv),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )
    return asked.stdout + asked.stderr


def size(num_bytes: float) -> str:
    """`3.5 GiB`: in the largest unit that leaves at least one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((i for i in range(4) if num_bytes < 1024 ** (i + 1)), 4)
    value = num_bytes / 1024**power
    return f"{value:.0f} {units[power]}" if power == 0 or value >= 100 else f"{value:.1f} {units[power]}"


def numbers(values: Sequence[int]) -> str:
    """`0-3,6`: numbers in ascending order, runs of them as ranges."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ranks(values: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2`."""
    return f"{'rank' if len(values) == 1 else 'ranks'} {numbers(values)}"
