"""What the build recorded: the MPI that the package was built beside. Imports neither torch nor MPI."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_train.errors import EnvironmentMismatch, MPIMismatch

SCHEMA = 1
RECORD = Path(__file__).parents[1] / "_build.json"
REMEDY = (
    "Use the mpirun and the library of the recorded MPI (its module, or the environment's own), or record "
    "the new one: `make setup`, or `pip install` the package again with its mpicc on PATH"
)

# Vendors that build on MPICH come before it: their version line names it as well.
_FAMILIES = (
    ("Open MPI", r"Open MPI v(\S+?)(?:,|\s|$)"),
    ("Intel MPI", r"Intel\(R\) MPI Library (\S+)"),
    ("Cray MPICH", r"CRAY MPICH version (\S+)"),
    ("MVAPICH", r"MVAPICH\S*\s+Version\s*:\s*(\S+)"),
    ("MPICH", r"MPICH Version\s*:\s*(\S+)"),
)


@dataclass(frozen=True, kw_only=True)
class MPIBuild:
    """One MPI library, as the build saw it."""

    abi: str
    """`openmpi` or `mpich`: the binary interface, which is also the name of mpi4py's variant."""
    library: str
    """Absolute path of the shared library."""
    version: str
    """First line of MPI_Get_library_version."""


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """The record of one build."""

    mpi: MPIBuild | None
    """None if the build saw no MPI; then any MPI that is found at run time is used."""


def load(path: Path = RECORD) -> BuildInfo:
    """Read the record; a source tree that was never built has none, which counts as a build without MPI.

    Raises `EnvironmentMismatch` if the file is damaged or of another schema.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return BuildInfo(mpi=None)
    try:
        record: dict[str, Any] = json.loads(text)
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']!r}")
        return BuildInfo(mpi=None if record["mpi"] is None else MPIBuild(**record["mpi"]))
    except (ValueError, KeyError, TypeError) as error:
        raise EnvironmentMismatch(
            f"the build's record {path} cannot be used: {error}. Expected a record of schema {SCHEMA}: "
            "build the package again (`make setup`, or `pip install`)."
        ) from None


def mpi4py_environment(path: Path = RECORD) -> dict[str, str]:
    """The environment variables that make mpi4py load the recorded library, and that library find its own
    parts; empty if none was recorded.

    They must be set before mpi4py is imported. MPI4PY_MPIABI is left unset on purpose: with it mpi4py picks
    its variant by that name and no longer opens the library of MPI4PY_LIBMPI; without it mpi4py opens the
    library and takes the ABI from it. Raises `MPIMismatch` if the recorded library is no longer there.
    """
    mpi = load(path).mpi
    if mpi is None:
        return {}
    if not Path(mpi.library).exists():
        raise MPIMismatch(
            f"the package was built beside {short_version(mpi.version)}, whose library {mpi.library} is not "
            f"there. {REMEDY}."
        )
    environment = {"MPI4PY_LIBMPI": mpi.library}
    family, version = parse_version(mpi.version)
    if family == "Open MPI" and (home := home_if_moved(mpi.library)):
        if version.startswith("4."):
            # A process that no launcher started starts a daemon of Open MPI 4, from there.
            environment["OPAL_PREFIX"] = home
        if "munge" in os.environ.get("PMIX_SECURITY_MODE", ""):
            # Slurm offers two ways to authenticate. The PMIx of a wheel was built without the first, munge,
            # and uses the second, but every rank would print a warning of eight lines.
            environment["PMIX_MCA_psec"] = "native"
    return environment


def home_if_moved(file: str) -> str:
    """The prefix of an Open MPI that was moved after its build, as a wheel's is: it does not find its own
    files. Empty for one that is where it was built.

    Args:
        file: its mpirun or its library.
    """
    home = Path(file).parent.parent
    moved = (home / "pyvenv.cfg").is_file() or (home / "conda-meta").is_dir()
    return str(home) if moved else ""


def check_mpi(library_version: str, path: Path = RECORD) -> None:
    """Compare the MPI at run time, by its MPI_Get_library_version, with the recorded one. Not collective.

    Family and version number count, not the packager's remarks after them. Raises `MPIMismatch`; without a
    recorded MPI any MPI is accepted.
    """
    mpi = load(path).mpi
    if mpi is not None and parse_version(library_version) != parse_version(mpi.version):
        raise MPIMismatch(
            f"the MPI at run time is {short_version(library_version)}, but the package was built beside "
            f"{short_version(mpi.version)} ({mpi.library}). {REMEDY}."
        )


def parse_version(library_version: str) -> tuple[str, str]:
    """Family and version number; of an unknown MPI the whole first line and an empty string."""
    for family, pattern in _FAMILIES:
        match = re.search(pattern, library_version)
        if match is not None:
            return family, match.group(1)
    return library_version.partition("\n")[0].strip(), ""


def short_version(library_version: str) -> str:
    """Family and version number in words: `Open MPI 5.0.11`."""
    return " ".join(parse_version(library_version)).strip()
