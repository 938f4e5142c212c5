"""Which program starts the ranks: the mpirun of the MPI that the package was built for, by its absolute path;
or horovodrun, or srun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hvd_train.environment import mpi_build
from hvd_train.environment.mpi_launcher import MPILauncher, identify
from hvd_train.errors import EnvironmentMismatch, MPIMismatch


def environment_first(path: str) -> str:
    """A PATH with the folder of this Python's own tools before all others."""
    own = str(Path(sys.executable).parent)
    return path if path.split(os.pathsep)[0] == own else f"{own}{os.pathsep}{path}"


def horovodrun() -> str:
    """Its absolute path. Raises `EnvironmentMismatch`."""
    remedy = "`make setup` builds Horovod, or prints why it cannot; or use --launcher mpirun"
    return _program("horovodrun", remedy)


def srun() -> str:
    """Its absolute path. Raises `EnvironmentMismatch`."""
    return _program("srun", "load Slurm's module, or use --launcher mpirun")


def _program(name: str, remedy: str) -> str:
    found = shutil.which(name, path=environment_first(os.environ.get("PATH", os.defpath)))
    if found is None:
        raise EnvironmentMismatch(f"there is no {name} on PATH: {remedy}.")
    return str(Path(found).absolute())


def mpirun() -> tuple[str, MPILauncher]:
    """The absolute path of the launcher that belongs to the recorded MPI, and whose it is; where none was
    recorded the first on PATH.

    Raises `EnvironmentMismatch` if there is none, `MPIMismatch` if there are only those of other MPIs.
    """
    recorded = mpi_build.load().mpi
    wanted = None if recorded is None else mpi_build.parse_version(recorded.version)
    seen: list[str] = []
    near: list[tuple[str, MPILauncher]] = []
    for program in _candidates(None if recorded is None else Path(recorded.library)):
        launcher = _identity(program)
        seen.append(f"{program} of {launcher}")
        if launcher.family and (wanted is None or wanted == (launcher.family, launcher.version)):
            return program, launcher
        if wanted is not None and _starts(launcher, *wanted):
            near.append((program, launcher))
    if near:
        return near[0]
    if wanted is None or not seen:
        raise EnvironmentMismatch(
            f"no mpirun of a known MPI was found: there is {', '.join(seen) or 'none'}. Run `make setup`, or "
            "load the MPI's module."
        )
    raise MPIMismatch(
        f"no mpirun of {' '.join(wanted)}, which the package was built for, was found: there is "
        f"{', '.join(seen)}. {mpi_build.REMEDY}."
    )


def _starts(launcher: MPILauncher, family: str, version: str) -> bool:
    """Whether it starts ranks that use this library, though its version is another."""
    if family == "Open MPI":
        return launcher.family == family and launcher.version.split(".")[0] == version.split(".")[0]
    return launcher.family == ("Intel MPI" if family == "Intel MPI" else "MPICH")  # or what is made from it


def _candidates(library: Path | None) -> Iterator[str]:
    """Launchers, best first: those beside the library, those beside this Python, those on PATH."""
    folders = [] if library is None else [parent / "bin" for parent in library.parents]
    folders.append(Path(sys.executable).parent)
    folders += [Path(entry) for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry]
    # The shell script that Intel MPI has for mpirun finds nothing unless the environment is active.
    programs = [str((f / name).absolute()) for f in folders for name in ("mpirun", "mpiexec.hydra")]
    # Not Path.is_file(), which fails in a folder that cannot be looked into.
    yield from dict.fromkeys(p for p in programs if os.path.isfile(p) and os.access(p, os.X_OK))


def _identity(program: str) -> MPILauncher:
    try:
        return identify(program)
    except (OSError, subprocess.TimeoutExpired):
        return MPILauncher("", "")
