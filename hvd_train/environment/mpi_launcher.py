"""Which MPI an `mpirun` belongs to, by its `--version`. Starts no rank; imports neither torch nor MPI."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_TIMEOUT_S = 10.0

# As in `mpi_build`: vendors that build on MPICH come before it.
_FAMILIES = (
    ("Open MPI", r"\(Open MPI\) (\S+)"),
    ("Intel MPI", r"Intel\(R\) MPI Library .*?Version (\S+)"),
    ("MPICH", r"HYDRA build details:\s+Version:\s+(\S+)"),
)

SRUN_TYPES = {"Open MPI": "pmix", "MPICH": "pmi2", "MVAPICH": "pmi2", "Intel MPI": "pmi2"}
"""By family of the MPI: the srun --mpi=TYPE under which its processes usually connect."""


@dataclass(frozen=True)
class MPILauncher:
    """The MPI of a launcher. `family` is a name that `mpi_build.parse_version` gives too, so that
    launcher and library can be compared; both are empty for a program that is none of these."""

    family: str
    version: str
    known_to_horovodrun: bool = True
    """Whether horovodrun recognises it. It recognises MPICH's own only if that name happens to be among the
    options that it was built with."""

    def __str__(self) -> str:
        return f"{self.family} {self.version}".strip() or "an unknown MPI"


def identify(program: str) -> MPILauncher:
    """Asks `program --version`, which may take seconds on a slow file system.

    Raises `OSError` if it cannot be started, `subprocess.TimeoutExpired` if it does not answer in 10 s.
    """
    asked = subprocess.run(
        [program, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT_S,
        check=False,
    )
    return parse(asked.stdout + asked.stderr)


def parse(text: str) -> MPILauncher:
    """Of what `--version` printed."""
    for family, pattern in _FAMILIES:
        match = re.search(pattern, text)
        if match is not None:
            return MPILauncher(family, match[1], family != "MPICH" or "MPICH" in text)
    return MPILauncher("", "")
