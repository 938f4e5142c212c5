"""Slurm: the allocation, and whether its srun can start ranks of the MPI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from hvd_train.environment.mpi_launcher import SRUN_TYPES
from hvd_train.environment.srun import mpi_types
from hvd_train.tools.doctor.check import Check, ask


def allocation(environ: Mapping[str, str] = os.environ) -> Check:
    """The job that this process is in."""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return Check(name="Slurm", seen="no allocation")
    facts = [
        f"{word} {environ[key]}"
        for key, word in (
            ("SLURM_JOB_NODELIST", "nodes"),
            ("SLURM_NTASKS", "tasks"),
            ("SLURM_CPUS_PER_TASK", "cores a task"),
            ("SLURM_JOB_PARTITION", "partition"),
        )
        if key in environ
    ]
    return Check(name="Slurm", seen=", ".join([f"job {job}", *facts]))


def srun(mpi: str, environ: Mapping[str, str] = os.environ) -> Check:
    """Whether srun supports the MPI.

    Args:
        mpi: family and version of the MPI; empty if there is none.
    """
    name = "srun"
    program = shutil.which("srun", path=environ.get("PATH"))
    if program is None:
        return Check(name=name, seen="none on PATH")
    said = ask([program, "--mpi=list"])
    types = sorted(kind for kind in mpi_types(said) if kind.startswith(("pmix", "pmi2", "cray_shasta")))
    if not mpi_types(said):
        first = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "nothing")
        in_job = "SLURM_JOB_ID" in environ
        remedy = "Set SLURM_CONF, or run this where Slurm is set up. Without it, start by mpirun."
        seen = f"{program} prints: {first}"
        return Check(name=name, status="warning" if in_job or mpi else "ok", seen=seen, remedy=remedy)
    seen = f"--mpi=list has {', '.join(types) or 'neither pmix nor pmi2'}"
    return _fit(name, mpi, types, seen, environ.get("SLURM_MPI_TYPE", ""))


def _fit(name: str, mpi: str, types: list[str], seen: str, chosen: str) -> Check:
    wanted = next((kind for family, kind in SRUN_TYPES.items() if mpi.startswith(family)), "pmi2")
    if not mpi:
        return Check(name=name, seen=f"{seen}; there is no MPI for it")
    if not any(kind.startswith(wanted) for kind in types):
        remedy = (
            f"{mpi} needs {wanted}: start by mpirun inside the allocation (sbatch, salloc), or have the site "
            "add it."
        )
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    if chosen and not chosen.startswith(("pmix", wanted)):
        seen, remedy = (
            f"{seen}, but SLURM_MPI_TYPE is {chosen}",
            f"Give srun `--mpi={wanted}`: {mpi} needs it.",
        )
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    return Check(name=name, seen=f"{seen}: `srun --mpi={wanted}` fits {mpi}")
