"""The Slurm allocation that this process is in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from hvd_train.environment import srun
from hvd_train.errors import EnvironmentMismatch
from hvd_train.launching.hosts import Host

_TIMEOUT_S = 10.0


def in_allocation(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs in one, so that srun and mpirun take the hosts from there."""
    return "SLURM_JOB_ID" in environ


def num_tasks(environ: Mapping[str, str] = os.environ) -> int | None:
    """Ranks that the allocation was asked for: its tasks, or tasks per node times nodes; without
    either, one per node, as srun starts them. None outside of one."""
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")
    texts = [environ.get(name, "") for name in names]
    tasks, per_node, nodes = (int(t) if t.isascii() and t.isdigit() else None for t in texts)
    return tasks or (nodes and nodes * (per_node or 1))


def mpi_types() -> frozenset[str]:
    """What srun's --mpi takes; empty where srun does not say."""
    return srun.mpi_types(_ask("srun", "--mpi=list"))


def hosts(environ: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """The allocation's hosts with their tasks. Raises `EnvironmentMismatch` if they are unknown."""
    listed = environ.get("SLURM_JOB_NODELIST", "")
    names = _ask("scontrol", "show", "hostnames", listed).split()
    tasks = expand_tasks(environ.get("SLURM_TASKS_PER_NODE", ""))
    if not names or len(names) != len(tasks):
        raise EnvironmentMismatch(
            f"the hosts of Slurm's job {environ.get('SLURM_JOB_ID')} are unknown: SLURM_JOB_NODELIST = "
            f"{listed!r}, which scontrol expands to {len(names)} hosts, and SLURM_TASKS_PER_NODE = "
            f"{environ.get('SLURM_TASKS_PER_NODE', '')!r}. Name them with --hosts."
        )
    return tuple(Host(name, count) for name, count in zip(names, tasks, strict=True))


def expand_tasks(text: str) -> list[int]:
    """One number a host, of `2(x3),1`; empty for other text."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _ask(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    try:
        asked = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout + asked.stderr if asked.returncode == 0 else ""
