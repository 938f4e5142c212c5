"""What started this process, as its environment tells. No MPI is loaded for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_PROMISES = (
    # launcher, variable of the world size, variable of the rank, what it provides
    ("horovodrun over Gloo", "HOROVOD_SIZE", "HOROVOD_RANK", "gloo"),
    ("mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpi"),
    ("mpiexec of MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK", "mpi"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "mpi"),
)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Who started this process, as one of how many."""

    name: str
    """In words, for messages; empty if nothing did."""

    size: int
    """Processes that it promised to start together; 1 if nothing did."""

    rank: int
    """This process's number among them."""

    provides: str
    """`mpi`, `gloo` or `nothing`."""


def detect(environ: Mapping[str, str] = os.environ) -> Launcher:
    """Reads the launcher's own variables. A process that nothing started is one of one."""
    for name, size, rank, provides in _PROMISES:
        if environ.get(size, "").isdigit():
            return Launcher(
                name=name, size=int(environ[size]), rank=int(environ.get(rank) or 0), provides=provides
            )
    return Launcher(name="", size=1, rank=0, provides="nothing")
