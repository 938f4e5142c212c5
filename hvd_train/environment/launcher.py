"""What started this process, according to its environment. No MPI is loaded for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_train.environment import mpi_build
from hvd_train.environment.mpi_launcher import SRUN_TYPES
from hvd_train.errors import LauncherMismatch

_PMI = "mpiexec of MPICH or Intel MPI"

# A launcher comes before those that may have started it: its own variables count.
_PROMISES = (
    # launcher, variable of the world size, variable of the rank, what it provides
    ("horovodrun over Gloo", "HOROVOD_SIZE", "HOROVOD_RANK", "gloo"),
    ("mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpi"),
    (_PMI, "PMI_SIZE", "PMI_RANK", "mpi"),
    ("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "mpi"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "mpi"),
)

_UNBIND = {
    "mpirun of Open MPI": "`mpirun --bind-to none`",
    _PMI: "`mpiexec -bind-to none` (Intel MPI: `mpiexec -genv I_MPI_PIN 0`)",
    "flux run": "`flux run -o cpu-affinity=off`",
    "srun": "`srun --cpu-bind=none`",
}


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What started this process, and how many with it."""

    name: str
    """In words, for messages; empty if nothing did."""

    size: int | None
    """Processes that it promised to start together; 1 if nothing did, None if unknown."""

    rank: int
    """This process's number among them."""

    provides: str
    """`mpi`, `gloo` or `nothing`."""

    def promised(self, world_size: int) -> bool:
        """Whether a world of this size is what the launcher promised. Without one anything may be: there are
        launchers that are not known here."""
        if not self.name:
            return True
        return world_size > self.rank if self.size is None else world_size == self.size

    @property
    def deals_cores(self) -> bool:
        """Whether it gives each process the cores that the job asked for; mpirun has its own rules."""
        return self.name in ("srun", "flux run")

    @property
    def unbind(self) -> str:
        """What to start the processes with so that they are bound to no core."""
        return _UNBIND.get(self.name, "a launcher that does not bind them")

    @property
    def speaks(self) -> bool:
        """Whether this process reports an error that each of them may find by itself. If the number of
        processes is unknown, rank 0 cannot find that it is not the only one, but rank 1 can."""
        return self.rank == 0 or (self.size is None and self.rank == 1)


def detect(environ: Mapping[str, str] = os.environ) -> Launcher:
    """Reads the launcher's own variables. A process without a launcher is the only one."""
    found = [
        Launcher(name=name, size=int(environ[size]), rank=int(environ.get(rank) or 0), provides=provides)
        for name, size, rank, provides in _PROMISES
        if environ.get(size, "").isdigit()
    ]
    if found and found[0].name == _PMI and "MPI_LOCALNRANKS" not in environ:
        # srun and flux set MPICH's variables too; MPICH's own launcher, which they may have started, sets
        # this one besides.
        same = (found[0].size, found[0].rank)
        found = [other for other in found[1:] if (other.size, other.rank) == same] + found
    if found:
        return found[0]
    if environ.get("PMIX_RANK", "").isdigit():
        # PMIx itself puts no size into the environment: prterun, for example, adds none.
        return Launcher(
            name="a launcher that speaks PMIx", size=None, rank=int(environ["PMIX_RANK"]), provides="mpi"
        )
    return Launcher(name="", size=1, rank=0, provides="nothing")


def forgotten_tasks(environ: Mapping[str, str] = os.environ) -> str:
    """A warning for the only process of a Slurm job that asked for several tasks; else empty."""
    tasks = environ.get("SLURM_NTASKS", "")
    launcher = detect(environ)
    if launcher.size != 1 or launcher.name not in ("", "srun") or not tasks.isdigit() or int(tasks) < 2:
        return ""
    return (
        f"the allocation has {tasks} tasks, and this is one process. Start it with `srun`, or by "
        "`hvd_train launch`."
    )


def require_way_in(library: str, environ: Mapping[str, str] = os.environ) -> None:
    """Before MPI is initialised: refuses a library that cannot connect by what the launcher has set.
    MPI would find it too, but each process would print a message of its own, or crash.

    Args:
        library: the loaded MPI's MPI_Get_library_version.

    Raises `LauncherMismatch` where it is certain; whether the world is the promised one is known later.
    """
    launcher = detect(environ)
    if launcher.provides != "nothing" and launcher.size != 1 and not _has_way_in(library, environ):
        raise mismatch(launcher, "mpi", library, 1, environ)


def _has_way_in(library: str, environ: Mapping[str, str]) -> bool:
    family, version = mpi_build.parse_version(library)
    if family == "Open MPI" and not version.startswith(("1.", "2.", "3.", "4.")):
        return "PMIX_NAMESPACE" in environ  # it knows PMIx only
    if family == "MPICH" and "pmix" not in library.lower():
        # Built without PMIx, as its configure line says, MPICH gives up where it sees a server of that kind.
        return "PMI_RANK" in environ or "PMIX_NAMESPACE" not in environ
    return True


def mismatch(
    launcher: Launcher, backend: str, library: str, world_size: int, environ: Mapping[str, str] = os.environ
) -> LauncherMismatch:
    """The error of a process whose world is not what its launcher promised.

    Args:
        library: what carries the backend's messages.
        world_size: of the world that the process sees.
    """
    number = f"one of {launcher.size}" if launcher.size is not None else f"rank {launcher.rank}"
    version = mpi_build.short_version(library)
    seen = (
        f"{launcher.name} started this process as {number}, but backend `{backend}` ({version}) sees a world "
        f"of {world_size}"
    )
    if backend == "solo":
        return LauncherMismatch(f"{seen}. Choose `--backend auto`, or start one process without a launcher.")
    return LauncherMismatch(f"{seen}: {_remedy(launcher, library, environ)}")


def _remedy(launcher: Launcher, library: str, environ: Mapping[str, str]) -> str:
    fits = f"srun --mpi={SRUN_TYPES.get(mpi_build.parse_version(library)[0], 'pmix')}"
    if launcher.name == "srun":
        return (
            f"`srun --mpi={environ.get('SLURM_MPI_TYPE', 'none')}` does not connect the processes of this "
            f"MPI. Start it with `{fits}` (`srun --mpi=list` lists what this Slurm supports), or within the "
            f"allocation with {_own_mpirun()}."
        )
    if launcher.provides == "gloo":
        return f"over Gloo there is no MPI. Choose `--backend auto`, or start it with {_own_mpirun()}."
    return (
        "the launcher belongs to another MPI than the one that this program loads. Start it with "
        f"{_own_mpirun()}, under Slurm with `{fits}`."
    )


def _own_mpirun() -> str:
    """The launcher of the MPI that the package was built for, by its path where that is known."""
    mpi = mpi_build.load().mpi
    if mpi is not None:
        program = Path(mpi.library).parent.parent / "bin" / "mpirun"
        if program.exists():
            return f"`{program}`"
    return "the mpirun of the same MPI"
