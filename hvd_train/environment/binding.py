"""The cores that ranks are bound to: what is wrong with them, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvd_train.environment.machine import AFFINITY
from hvd_train.io.text import counted


@dataclass(frozen=True, kw_only=True)
class CoreBinding:
    """Where one rank runs, as it sees it."""

    rank: int
    host: str

    cores: frozenset[int]
    """Its affinity mask."""

    host_cores: int
    """Cores of the host."""

    starter_cores: int
    """Cores of the process that started this one, which the rank might have had as well."""

    promised_cores: int
    """Cores that Slurm allocated to each task (SLURM_CPUS_PER_TASK); 0 without Slurm."""

    threads: int
    """Those of torch on this rank."""


def core_binding(rank: int, host: str, threads: int, environ: Mapping[str, str] = os.environ) -> CoreBinding:
    """Where this process runs."""
    promised = environ.get("SLURM_CPUS_PER_TASK", "")
    try:
        starter_cores = len(os.sched_getaffinity(os.getppid()))
    except OSError:  # it ended just now
        starter_cores = len(AFFINITY)
    return CoreBinding(
        rank=rank,
        host=host,
        cores=AFFINITY,
        host_cores=os.cpu_count() or 1,
        starter_cores=starter_cores,
        promised_cores=int(promised) if promised.isdigit() else 0,
        threads=threads,
    )


@dataclass(frozen=True)
class Complaint:
    """What slows ranks down, and what to do."""

    where: str
    """The host, or the first of several."""
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"on {self.where} {self.seen}. {self.remedy}"


def complaints(bindings: Sequence[CoreBinding], unbind: str, cores_are_dealt: bool) -> list[Complaint]:
    """What slows ranks with these bindings down: at most one complaint of each kind, naming the first host.

    Args:
        bindings: of all ranks.
        unbind: the launcher with its option to bind nothing, for the remedy.
        cores_are_dealt: whether the launcher gives each rank the cores that the job asked for, and no other.
    """
    hosts: dict[str, list[CoreBinding]] = {}
    for binding in bindings:
        hosts.setdefault(binding.host, []).append(binding)
    instead = "`srun --cpus-per-task`, which srun does not take from the job" if cores_are_dealt else unbind
    found = [
        *_of_hosts(hosts, _same_core, unbind),
        *_of_hosts(hosts, _too_many_threads, unbind),
        *_of_hosts(hosts, _fewer_than_promised, instead),
    ]
    if not found and not cores_are_dealt and len(bindings) > 1:
        found += _of_hosts(hosts, _idle_cores, unbind)
    return found


_Kind = Callable[[Sequence[CoreBinding], str], tuple[str, str] | None]
"""What is wrong on one host, and the remedy, given what to start the ranks with; None if nothing is."""


def _of_hosts(hosts: Mapping[str, Sequence[CoreBinding]], kind: _Kind, start: str) -> list[Complaint]:
    found = [(host, *wrong) for host, of_host in hosts.items() if (wrong := kind(of_host, start))]
    if not found:
        return []
    host, seen, remedy = found[0]
    more = f" and {counted(len(found) - 1, 'other host')}" if len(found) > 1 else ""
    return [Complaint(f"{host}{more}", seen, remedy)]


def _same_core(of_host: Sequence[CoreBinding], start: str) -> tuple[str, str] | None:
    """Ranks that take turns on the only core that each of them has."""
    bound = [binding.cores for binding in of_host if len(binding.cores) == 1]
    crowded = [cores for cores in bound if bound.count(cores) > 1]
    if not crowded or of_host[0].host_cores == 1:
        return None
    crowd = [binding for binding in of_host if binding.cores == crowded[0]]
    seen = f"{_ranks(crowd, of_host)} bound to core {min(crowded[0])} of {of_host[0].host_cores}"
    return f"{seen} and take turns on it", f"Start them with {start}."


def _too_many_threads(of_host: Sequence[CoreBinding], start: str) -> tuple[str, str] | None:
    crowded = [binding for binding in of_host if binding.threads > len(binding.cores)]
    if not crowded:
        return None
    first = crowded[0]
    seen = f"{_ranks(crowded, of_host)} set to {first.threads} threads on {counted(len(first.cores), 'core')}"
    return seen, f"Lower `--threads`, or start the ranks with {start}."


def _fewer_than_promised(of_host: Sequence[CoreBinding], start: str) -> tuple[str, str] | None:
    short = [s for s in of_host if len(s.cores) < min(s.promised_cores, s.host_cores)]
    if not short:
        return None
    first = short[0]
    seen = f"{_ranks(short, of_host)} bound to {counted(len(first.cores), 'core')}"
    return f"{seen}, but SLURM_CPUS_PER_TASK is {first.promised_cores}", f"Start them with {start}."


def _idle_cores(of_host: Sequence[CoreBinding], start: str) -> tuple[str, str] | None:
    """Ranks with one core each where there are more for each."""
    there = of_host[0].starter_cores
    if any(len(binding.cores) > 1 for binding in of_host) or there < 2 * len(of_host):
        return None
    seen = f"{_ranks(of_host, of_host)} bound to one core each, and {there} are available"
    return seen, f"Start them with {start}, so that each gets more threads."


def _ranks(some: Sequence[CoreBinding], of_host: Sequence[CoreBinding]) -> str:
    """Those ranks, and the verb."""
    if len(some) == len(of_host) > 1:
        return "all ranks are"
    named = ", ".join(str(binding.rank) for binding in some[:4])
    if len(some) == 1:
        return f"rank {named} is"
    return f"ranks {named} are" if len(some) <= 4 else f"ranks {named} and {len(some) - 4} more are"
