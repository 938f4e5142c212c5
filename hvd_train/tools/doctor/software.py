"""Programs and packages, as far as they can be known without loading them."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from hvd_train.environment import mpi_build
from hvd_train.environment.launcher import Launcher
from hvd_train.environment.mpi_launcher import identify
from hvd_train.tools.doctor.check import Check


def python() -> Check:
    """The interpreter."""
    version = platform.python_version()
    return Check(name="python", seen=f"{version}, {sys.executable}", alike=version)


def package(version: str) -> Check:
    """This package, and its folder."""
    folder = Path(mpi_build.__file__).parents[1]
    return Check(name="hvd_train", seen=f"{version}, {folder}", alike=version)


def build_record() -> Check:
    """The MPI that the package was built beside. Raises `EnvironmentMismatch` for a damaged record."""
    name = "build record"
    mpi = mpi_build.load().mpi
    if mpi is None:
        remedy = (
            "Any MPI that is found is used. `make setup`, or `pip install` with mpicc on PATH, records one."
        )
        return Check(name=name, status="warning", seen="built without an MPI", remedy=remedy)
    if not Path(mpi.library).exists():
        seen = f"built beside {mpi_build.short_version(mpi.version)}, but {mpi.library} is not there"
        return Check(name=name, status="error", seen=seen, remedy=f"{mpi_build.REMEDY}.")
    return Check(name=name, seen=f"built beside {mpi_build.short_version(mpi.version)}, {mpi.library}")


def mpi4py() -> Check:
    """Whether mpi4py is installed."""
    version = installed("mpi4py")
    if version:
        return Check(name="mpi4py", seen=version, alike=version)
    remedy = (
        "`pip install mpi4py`, or `make setup`: mpirun and srun need it. One process and horovodrun --gloo "
        "do not."
    )
    return Check(name="mpi4py", status="warning", seen="not installed", remedy=remedy)


def installed(distribution: str) -> str:
    """Its version; empty where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def started_by(launcher: Launcher) -> Check:
    """What started this process, according to its environment."""
    if not launcher.name:
        seen = "nothing: this is a single process"
    else:
        seen = f"{launcher.name}, as one of {launcher.size}; it provides {launcher.provides}"
    return Check(name="started by", seen=seen)


def mpirun(library_version: str, launcher: Launcher, search: str | None = None) -> Check:
    """Whether the mpirun that is first on PATH starts processes of the library that this program loads.

    Args:
        library_version: of the library that was loaded, else of the recorded one; empty if there is none.
        search: a PATH; None is that of this process.
    """
    name = "mpirun"
    program = shutil.which("mpirun", path=search) or shutil.which("mpiexec", path=search)
    if program is None:
        if launcher.name or not library_version:  # whatever started it
            return Check(name=name, seen="none on PATH")
        remedy = "Put the bin folder of the MPI on PATH (activate the environment, load the module)."
        return Check(name=name, status="warning", seen="none on PATH", remedy=remedy)
    found = identify(program)
    seen = f"{found}, {program}"
    family, version = mpi_build.parse_version(library_version)
    if not library_version:
        return Check(name=name, seen=f"{seen}; there is no library to compare it with")
    if not found.family:
        remedy = (
            f"It should be that of {family} {version}: if each rank sees a world of size 1, call that one by "
            "its path."
        )
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    if (found.family, found.version) == (family, version):
        return Check(name=name, seen=f"{seen}: the library's own")
    seen = f"{seen}, but the library is {family} {version}"
    if found.family == family and _major(found.version) == _major(version):
        remedy = f"They usually work together. If not, put the mpirun of {version} first on PATH."
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    remedy = (
        f"Put the mpirun of {family} {version} first on PATH, or call it by its path: each rank that this "
        "one starts would see a world of size 1."
    )
    return Check(name=name, status="error", seen=seen, remedy=remedy)


def _major(version: str) -> str:
    return version.partition(".")[0]
