"""The reports of all ranks: what is alike, what differs, how much memory each host needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvd_train.environment import machine
from hvd_train.environment.binding import CoreBinding, complaints
from hvd_train.environment.launcher import Launcher
from hvd_train.io.text import counted
from hvd_train.tools.doctor.check import Check, numbers, size
from hvd_train.tools.doctor.memory import Need, Place, loaded_bytes, state_bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank found."""

    binding: CoreBinding
    cpu_limit: float | None
    free_bytes: int
    """Memory that the host can still give."""
    checks: tuple[Check, ...]

    @property
    def rank(self) -> int:
        return self.binding.rank

    @property
    def host(self) -> str:
        return self.binding.host

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "binding": {**asdict(self.binding), "cores": sorted(self.binding.cores)},
            "cpu_limit": self.cpu_limit,
            "free_bytes": self.free_bytes,
            "checks": [check.to_json() for check in self.checks],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """Of what `to_json` made."""
        binding = CoreBinding(**{**values["binding"], "cores": frozenset(values["binding"]["cores"])})
        checks = tuple(Check(**check) for check in values["checks"])
        return cls(**{**values, "binding": binding, "checks": checks})


@dataclass(frozen=True)
class ReportedCheck:
    """A line of the report, and whose it is."""

    check: Check
    ranks: tuple[int, ...]
    """The ranks that report it, ascending."""
    everywhere: bool
    """Whether no rank reports otherwise, or it concerns the job as a whole."""


def merge(reports: Sequence[Report]) -> list[ReportedCheck]:
    """Each check once if all ranks that made it report the same, else once for each different result. What
    must be alike and is not is an error."""
    said: dict[str, dict[Check, list[int]]] = {}
    for report in reports:
        for check in report.checks:
            said.setdefault(check.name, {}).setdefault(check, []).append(report.rank)
    found = []
    for of_name in said.values():
        unlike = len({check.alike for check in of_name}) > 1
        for check, ranks in of_name.items():
            if unlike and check.status != "error":
                remedy = "It must be the same on every rank: install the same version on every host."
                check = replace(check, status="error", remedy=remedy)
            found.append(ReportedCheck(check, tuple(ranks), len(of_name) == 1))
    return found


def by_host(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """The reports of each host, in the order of their lowest ranks."""
    hosts: dict[str, list[Report]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report)
    return hosts


def checks_of_job(
    reports: Sequence[Report],
    backend: str,
    num_hosts: int,
    need: Mapping[str, Any] | None,
    launcher: Launcher,
) -> list[ReportedCheck]:
    """What concerns the job, or a host of it.

    Args:
        num_hosts: groups of ranks that share memory, as the backend found them.
        need: the values of a `Need`.
    """
    hosts = by_host(reports)
    found = [_of_all(reports, places(hosts, backend, num_hosts))] if len(reports) > 1 else []
    found += _each({host: threads(of_host, launcher) for host, of_host in hosts.items()}, hosts)
    if need is not None:
        found += _memory(hosts, backend, Need(**need), num_hosts)
    return found


def _memory(
    hosts: Mapping[str, list[Report]], backend: str, need: Need, num_hosts: int
) -> list[ReportedCheck]:
    """Of the hosts that have too little, else of the one with the least: what is free differs on all."""
    world_size = sum(map(len, hosts.values()))
    checks = {host: memory(of_host, backend, need, world_size, num_hosts) for host, of_host in hosts.items()}
    short = [host for host, check in checks.items() if check.status != "ok"]
    least = min(hosts, key=lambda host: hosts[host][0].free_bytes / len(hosts[host]))
    return [
        ReportedCheck(checks[host], tuple(report.rank for report in hosts[host]), len(hosts) == 1)
        for host in short or [least]
    ]


def _of_all(reports: Sequence[Report], check: Check) -> ReportedCheck:
    return ReportedCheck(check, tuple(r.rank for r in reports), True)


def _each(checks: Mapping[str, Sequence[Check]], hosts: Mapping[str, list[Report]]) -> list[ReportedCheck]:
    """The checks of each host, once if all hosts report the same."""
    said: dict[Check, list[int]] = {}
    for host, of_host in hosts.items():
        for check in checks[host]:
            said.setdefault(check, []).extend(report.rank for report in of_host)
    everyone = sum(map(len, hosts.values()))
    return [
        ReportedCheck(check, tuple(sorted(ranks)), len(ranks) == everyone) for check, ranks in said.items()
    ]


def places(hosts: Mapping[str, list[Report]], backend: str, num_hosts: int) -> Check:
    """Which ranks are where, and whether those of a host share memory."""
    listed = ", ".join(f"{host}: {numbers([r.rank for r in ranks])}" for host, ranks in hosts.items())
    total = sum(map(len, hosts.values()))
    world = f"{counted(total, 'rank')} on {counted(len(hosts), 'host')} ({listed})"
    seen = f"{world} connected by `{backend}`"
    if backend == "ring" and num_hosts > len(hosts):
        seen = f"{seen}, but share memory as if on {num_hosts} hosts"
        remedy = "Start all ranks of a host in one container, and mount /proc without hidepid."
        return Check(name="world", status="warning", seen=seen, remedy=remedy)
    return Check(name="world", seen=seen)


def threads(of_host: Sequence[Report], launcher: Launcher) -> list[Check]:
    """Threads of torch that each rank of a host would get, and what is wrong with its cores."""
    name = "threads"
    masks = [report.binding.cores for report in of_host]
    each = [
        machine.threads_for(mask, masks, report.cpu_limit)
        for mask, report in zip(masks, of_host, strict=True)
    ]
    spread = str(each[0]) if len(set(each)) == 1 else f"{min(each)} to {max(each)}"
    cores = len(frozenset().union(*masks))
    seen = f"{spread} for each of {counted(len(of_host), 'rank')} on {counted(cores, 'core')}"
    bindings = [replace(report.binding, threads=n) for report, n in zip(of_host, each, strict=True)]
    if found := complaints(bindings, launcher.unbind, launcher.deals_cores):
        return [
            Check(name=name, status="warning", seen=f"{seen}: {said.seen}", remedy=said.remedy)
            for said in found
        ]
    if cores < len(of_host):
        remedy = "Start no more ranks on a host than it has cores: they wait for one another in every round."
        return [Check(name=name, status="warning", seen=seen, remedy=remedy)]
    return [Check(name=name, seen=seen)]


def memory(of_host: Sequence[Report], backend: str, need: Need, world_size: int, num_hosts: int = 1) -> Check:
    """What all ranks of a host need at the peak of a training, against what it can give."""
    free = of_host[0].free_bytes
    alone = world_size == 1 and backend == "solo"

    def at(ranks: int) -> Place:
        if ranks == len(of_host):
            return Place(ranks=ranks, world_size=world_size, num_hosts=num_hosts, backend=backend)
        return Place(ranks=ranks, world_size=ranks, num_hosts=1, backend="ring")

    def needed(ranks: int) -> int:
        return state_bytes(need, at(ranks)) + loaded_bytes(need, at(ranks), free)

    ranks = len(of_host)
    seen = (
        f"{need.words}, S = {size(need.state_bytes)}: {_estimate(need, at(ranks), free)} of {size(free)} free"
    )
    if needed(ranks) > free:
        remedy = (
            "Use fewer ranks per host, `sync.optimizer_state = 'keep'` or a smaller model, or raise the "
            "limit."
        )
        return Check(name="memory", status="error", seen=seen, remedy=remedy)
    # Alone: would one rank a core fit, as mpirun would start them?
    wanted = len(of_host[0].binding.cores)
    if alone and needed(wanted) > free:
        most = max(n for n in range(1, wanted + 1) if needed(n) <= free)
        seen = f"{seen}; {_estimate(need, at(wanted), free)} would not fit"
        remedy = f"Start no more than {counted(most, 'rank')} on this host."
        return Check(name="memory", status="warning", seen=seen, remedy=remedy)
    return Check(name="memory", seen=seen)


def _estimate(need: Need, at: Place, free: int) -> str:
    """The sum, and what it is made of."""
    state, loaded = state_bytes(need, at), loaded_bytes(need, at, free)
    verb = "needs" if at.ranks == 1 else "need"
    return (
        f"{counted(at.ranks, 'rank')} {verb} {at.copies} S and gradients, {size(state)} with slices and the "
        f"copies of a checkpoint, and {size(loaded)} for torch and the data: {size(state + loaded)}"
    )
