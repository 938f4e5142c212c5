"""Judges the facts of a host, compared with those of the host that starts the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hvd_train.environment import mpi_build, mpi_launcher
from hvd_train.launching.check_hosts.finding import OK, Finding
from hvd_train.launching.check_hosts.probe import Facts, ProbeRequest
from hvd_train.launching.check_hosts.remote import ProbeResult
from hvd_train.launching.hosts import Host

SKEW_S = 2.0
"""A larger difference of the clocks causes a warning."""


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What a host is compared with."""

    facts: Facts
    """Of this host."""
    python: str
    """Path of this host's interpreter."""
    request: ProbeRequest


def judge_own(host: Host, standard: Standard) -> dict[str, Finding]:
    """The findings, by check, on this host itself."""
    return {
        "resolves": Finding(cell="here"),
        "reachable": Finding(cell="here"),
        "ssh": Finding(cell="here"),
        "python": OK,
        "package": _package(standard.facts, standard),
        "mpi": _mpi(standard.facts, standard),
        "runs": _runs(host, standard.facts),
        "port": OK,
        "clock": OK,
        "cores": _cores(host, standard.facts),
    }


def judge(host: Host, result: ProbeResult, standard: Standard) -> dict[str, Finding]:
    """The findings, by check, on a host that was probed. Of the checks whose facts are missing
    the first fails and the others are left out: the probe hung or broke there."""
    facts = result.facts
    checks: tuple[tuple[str, Iterable[str], Callable[[], Finding]], ...] = (
        ("python", ["python"], lambda: _python(facts, standard)),
        ("cores", ["cores"], lambda: _cores(host, facts)),
        ("package", ["package", "torch"], lambda: _package(facts, standard)),
        ("mpi", ["record", "mpirun"], lambda: _mpi(facts, standard)),
        ("port", ["home"], lambda: _port(result, standard.request["port"])),
        ("runs", ["runs"], lambda: _runs(host, facts)),
        ("clock", ["started", "ended"], lambda: _clock(host, result)),
    )
    row = dict.fromkeys(("resolves", "reachable", "ssh"), OK)
    complete = True
    for check, needed, finding in checks:
        if all(name in facts for name in needed):
            row[check] = finding()
        elif complete:
            row[check] = _missing(check, result, standard)
            complete = False
    return row


def _missing(check: str, result: ProbeResult, standard: Standard) -> Finding:
    by_hand = {
        "runs": f"`ls {standard.request['runs']}`: where that hangs, its file server does not answer",
        "mpi": f"`{standard.request['mpirun']} --version`",
    }.get(check, f"`{standard.python} -c 'import hvd_train'`")
    return Finding(
        cell="silent",
        seen=f"the check did not finish there: {result.end}",
        expected="an answer within a second or two",
        remedy=f"Log in and try {by_hand}",
    )


def _python(facts: Facts, standard: Standard) -> Finding:
    here, there = standard.facts["python"], facts["python"]
    if there == here:
        return OK
    return Finding(
        cell=there,
        seen=f"{standard.python} is Python {there}",
        expected=f"{here}, as here",
        remedy="Set up the same environment there, or keep it in a folder that all hosts share",
    )


def _package(facts: Facts, standard: Standard) -> Finding:
    here, there = standard.facts["package"]["found"], facts["package"]["found"]
    if facts["package"]["wrong"]:
        return Finding(
            cell=there,
            seen=f"hvd_train cannot be imported there: {facts['package']['wrong']}",
            expected=f"hvd_train {here}",
            remedy="Install it into the environment there, or keep the environment in a folder that all "
            "hosts share; start from a folder that is on every host too",
        )
    if there != here:
        return Finding(
            cell=there,
            seen=f"hvd_train is {there}",
            expected=f"{here}, as here",
            remedy="Install the same version there",
        )
    if facts["torch"] != standard.facts["torch"]:
        there = facts["torch"] or "absent"
        return Finding(
            cell=f"torch {there}",
            seen=f"torch is {there}",
            expected=f"{standard.facts['torch']}, as here",
            remedy="Install the same version there",
        )
    return OK


def _mpi(facts: Facts, standard: Standard) -> Finding:
    here = mpi_build.short_version(standard.facts["record"]["version"])
    record = facts["record"]
    there = mpi_build.short_version(record["version"])
    if there != here:
        return Finding(
            cell=there or "unrecorded",
            seen=f"the package there was built for {there or 'no MPI'}",
            expected=f"{here or 'none'}, as here",
            remedy="Install the package there beside the same MPI",
        )
    if record["library"] and not record["there"]:
        return Finding(
            cell="no library",
            seen=f"the library that the package was built for, {record['library']}, is not there",
            expected=there,
            remedy="Install this MPI there at the same place",
        )
    return _launcher(facts, standard)


def _launcher(facts: Facts, standard: Standard) -> Finding:
    program = standard.request["mpirun"]
    if not program:
        return OK
    here, there = (mpi_launcher.parse(f["mpirun"]["found"]) for f in (standard.facts, facts))
    if facts["mpirun"]["wrong"]:
        return Finding(
            cell=facts["mpirun"]["found"],
            seen=f"{program} cannot be used there: {facts['mpirun']['wrong']}",
            expected=f"{here}, whose daemon is started from that folder",
            remedy="Install this MPI there at the same path, or keep it in a folder that all hosts share",
        )
    if there != here:
        return Finding(
            cell=there.version or "unknown",
            seen=f"{program} is of {there}",
            expected=f"{here}, as here",
            remedy="Install the same version there",
        )
    return OK


def _runs(host: Host, facts: Facts) -> Finding:
    answer = facts["runs"]
    if not answer["wrong"]:
        return OK
    return Finding(
        cell=answer["found"],
        seen=answer["wrong"],
        expected="one folder that every host sees and can write",
        remedy=f"Mount the same file system on {host.name}, or give --runs a folder on one that is shared",
    )


def _port(result: ProbeResult, port: int) -> Finding:
    answer = result.facts["home"]
    if not answer["wrong"]:
        return OK
    return Finding(
        cell=answer["found"],
        seen=f"it cannot connect to {result.home}, port {port}, of this host: {answer['wrong']}",
        expected="a connection, as the launcher's daemons and the ranks make them on any port",
        remedy="Let the firewalls of these hosts accept TCP from each other on all ports (`nft list ruleset` "
        "shows them)",
    )


def _clock(host: Host, result: ProbeResult) -> Finding:
    """The clock's offset from this host's is between the bounds given by the probe's end and its start, since
    the one came after the question and the other before the answer. The smallest possible offset counts."""
    lowest = result.facts["ended"] - result.answered
    highest = result.facts["started"] - result.asked
    if abs(max(lowest, min(0.0, highest))) <= SKEW_S:
        return OK
    middle, half = (highest + lowest) / 2, (highest - lowest) / 2
    return Finding(
        cell=f"{middle:+.1f} s",
        seen=f"its clock is {abs(middle):.1f} s {'ahead' if middle > 0 else 'behind'} (give or take "
        f"{half:.1f} s, half the round trip)",
        expected=f"{SKEW_S:g} s at most: times in logs and of files will not be in order",
        remedy=f"Start a time service on {host.name} (chrony, ntpd or systemd-timesyncd)",
        warning=True,
    )


def _cores(host: Host, facts: Facts) -> Finding:
    cores = facts["cores"]
    if host.slots <= cores:
        return OK
    return Finding(
        cell=f"{cores} < {host.slots}",
        seen=f"{host.slots} slots on {cores} cores",
        expected="at least one core for each rank",
        remedy=f"Give it fewer slots: {host.name}:{cores}",
        warning=True,
    )
