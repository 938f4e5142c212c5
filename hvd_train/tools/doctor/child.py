"""The parent's side of `probe`: a child that may hang or crash, and what it reported until then."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvd_train.tools.doctor.check import Check, ended_by
from hvd_train.tools.doctor.options import Options

_PACKAGES = str(Path(__file__).resolve().parents[3])
"""The folder that holds the package which runs now."""


@dataclass(kw_only=True)
class ChildReport:
    """What a child reported."""

    checks: list[Check] = field(default_factory=list)
    joined: bool = False
    world: dict[str, Any] | None = None
    """On rank 0, once the ranks have connected."""
    failure: Check | None = None
    """Why it did not finish."""
    agreed: bool = False
    """Whether every rank knows of the failure."""


class Child:
    """A running `probe`."""

    def __init__(self, options: Options) -> None:
        self._deadline = time.monotonic() + options.timeout
        self._timeout_s = options.timeout
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), _PACKAGES]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hvd_train.tools.doctor.probe", json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that what an MPI starts ends with it
            close_fds=False,  # MPICH's launcher talks through one that it left open
        )

    def finish(self, report: str) -> ChildReport:
        """Gives it this rank's report, and waits for its end, or ends it at its deadline."""
        late = False
        try:
            said, _ = self._process.communicate(report, max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            self.kill()
            said, _ = self._process.communicate()
        child_report, doing = _understand(said)
        if late:
            child_report.failure = self._failure(doing, f"did not end within {self._timeout_s:g} s")
        elif self._process.returncode != 0:
            child_report.failure = self._failure(
                doing, f"ended the process with {ended_by(self._process.returncode)}"
            )
        return child_report

    def _failure(self, doing: tuple[str, str], how: str) -> Check:
        remedy = (
            "See its output on standard error. If MPI failed: start with the launcher of the same MPI, under "
            "Slurm by `srun --mpi=pmix`; a slow file system needs a larger --timeout."
        )
        name, words = doing
        return Check(name=name, status="error", seen=f"{words} {how}", remedy=remedy)

    def kill(self) -> None:
        """Ends it, and all that it started; nothing happens if it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _understand(said: str) -> tuple[ChildReport, tuple[str, str]]:
    """What was reported; name and words of the check that was begun last."""
    child_report, doing = ChildReport(), ("python", "starting Python")
    for line in said.splitlines():
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:  # it was killed while it wrote
            continue
        if kind == "begin":
            doing = value[0], value[1]
        elif kind == "check":
            child_report.checks.append(Check(**value))
        elif kind == "failed":
            child_report.failure, child_report.agreed = Check(**value["check"]), value["agreed"]
        elif kind == "joined":
            child_report.joined, child_report.world = True, value
    return child_report, doing
