"""The whole of `hvd_train doctor`."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hvd_train.environment import machine, mpi_build
from hvd_train.environment.binding import core_binding
from hvd_train.environment.interfaces import interfaces
from hvd_train.environment.launcher import Launcher, detect
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.doctor import choices, host, network, slurm, software, storage, world
from hvd_train.tools.doctor.check import Check, attempt
from hvd_train.tools.doctor.child import Child, ChildReport
from hvd_train.tools.doctor.options import Options
from hvd_train.tools.doctor.text import in_words
from hvd_train.tools.doctor.world import Report, ReportedCheck

_AFTER_RANK_0_S = 3.0
"""Before there is a world, a rank other than 0 reports only if rank 0 has not ended the job by then."""


def run(options: Options, version: str) -> int:
    """Runs the checks and prints the report on rank 0. Collective where a launcher started several processes.

    Args:
        version: of hvd_train.

    Returns the exit code of this rank.
    """
    launcher = detect()
    child = Child(options)
    try:
        checks = _local(options, version, launcher)
        child_report = child.finish(json.dumps(_report(launcher, checks).to_json()))
    finally:
        child.kill()
    if launcher.rank > 0:
        return 0 if child_report.joined and child_report.failure is None else _report_alone(child_report)
    reports = _reports(launcher, checks, child_report)
    return _print(options, _conclude(reports, child_report, launcher), {r.rank: r.host for r in reports})


def _local(options: Options, version: str, launcher: Launcher) -> list[Check]:
    """The checks that load nothing, side by side: some ask programs."""
    config, mpi = options.load(), _mpi_in_words()
    runs = Path(config.runs)
    todo: dict[str, Callable[[], Check]] = {
        "python": software.python,
        "hvd_train": lambda: software.package(version),
        "build record": software.build_record,
        "mpi4py": software.mpi4py,
        "started by": lambda: software.started_by(launcher),
        "affinity": host.affinity,
        "cpu.max": host.cpu_limit,
        "shared memory": host.shared_memory,
        "CMA, XPMEM": host.single_copy,
        "ulimit -l": host.locked_memory,
        "ulimit -n": lambda: host.open_files(launcher.size or 1),
        "interfaces": lambda: network.check(interfaces(), mpi),
        "runs": lambda: storage.runs_folder(runs),
        "HDF5 locks": lambda: storage.file_locking(runs),
        "Slurm": slurm.allocation,
        "srun": lambda: slurm.srun(mpi),
        "averages": lambda: choices.averages(config.sync),
    }
    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, todo.keys(), todo.values()))


def _mpi_in_words() -> str:
    """Family and version of the recorded MPI; empty if none was recorded."""
    try:
        recorded = mpi_build.load().mpi
    except EnvironmentMismatch:  # reported by the check of the record
        return ""
    return mpi_build.short_version(recorded.version) if recorded else ""


def _report(launcher: Launcher, checks: Sequence[Check]) -> Report:
    return Report(
        # How many threads it would get depends on the cores of all ranks.
        binding=core_binding(launcher.rank, platform.node(), threads=1),
        cpu_limit=machine.cpu_limit(),
        free_bytes=machine.available_memory(),
        checks=tuple(checks),
    )


def _report_alone(child_report: ChildReport) -> int:
    """A rank that did not connect prints why, unless all ranks know and rank 0 prints it."""
    time.sleep(_AFTER_RANK_0_S)
    if not child_report.agreed:
        for check in (*child_report.checks, *filter(None, [child_report.failure])):
            if check.status == "error":
                print(
                    f"hvd_train doctor: {check.name}: {check.seen} {check.remedy}",
                    file=sys.stderr,
                    flush=True,
                )
    return 1


def _reports(launcher: Launcher, checks: Sequence[Check], child_report: ChildReport) -> list[Report]:
    """Of all ranks, if they connected; else what this one knows."""
    if child_report.world is not None:
        return [Report.from_json(report) for report in child_report.world["reports"]]
    mine = [*checks, *child_report.checks, *filter(None, [child_report.failure])]
    return [_report(launcher, mine)]


def _conclude(
    reports: list[Report], child_report: ChildReport, launcher: Launcher
) -> tuple[list[ReportedCheck], str, str]:
    """The lines; the backend that `auto` takes, empty if none; what to start."""
    findings = world.merge(reports)
    everyone = tuple(report.rank for report in reports)
    loads = any(f.check.name == "torch" and f.check.status == "ok" for f in findings)
    backend = "solo" if loads and not launcher.name else ""
    if child_report.world is not None:
        facts = child_report.world
        backend = facts["backend"]
        findings += [ReportedCheck(Check(**check), everyone, True) for check in facts["checks"]]
        findings += world.checks_of_job(reports, backend, facts["num_hosts"], facts["need"], launcher)
        if child_report.failure is not None:  # after everything was reported
            findings.append(ReportedCheck(child_report.failure, everyone, True))
    return findings, backend, _start(findings, backend, launcher)


def _start(findings: Sequence[ReportedCheck], backend: str, launcher: Launcher) -> str:
    """Which backend `auto` takes, and the line that starts a training."""
    if not backend:
        return "Nothing would train here: see the errors above."
    if launcher.name:
        return f"`auto` takes {backend} here. The same line without `doctor` trains."
    good = {f.check.name for f in findings if f.check.status == "ok"}
    ranks = max(2, len(machine.AFFINITY))
    alone = "`auto` takes solo for one process: `python -m hvd_train`"
    mpi = _seen(findings, "MPI")
    if {"MPI", "mpirun", "mpi4py"} <= good and "none on PATH" not in _seen(findings, "mpirun"):
        taken = "ring" if "ring in a host" in good else "mpi"
        binding = "--bind-to none " if mpi.startswith("Open MPI") else ""
        return f"{alone}; {taken} for several: `mpirun {binding}-np {ranks} python -m hvd_train`."
    if "Gloo" in _seen(findings, "Horovod"):
        return f"{alone}; horovod for several: `horovodrun --gloo -np {ranks} python -m hvd_train`."
    return f"{alone}. No launcher for several was found."


def _seen(findings: Sequence[ReportedCheck], name: str) -> str:
    return next((f.check.seen for f in findings if f.check.name == name and f.check.status == "ok"), "")


def _print(options: Options, concluded: tuple[list[ReportedCheck], str, str], host_of: dict[int, str]) -> int:
    findings, backend, start = concluded
    tally = {status: sum(f.check.status == status for f in findings) for status in ("error", "warning")}
    report = {
        "checks": [{**f.check.to_json(), "ranks": f.ranks, "everywhere": f.everywhere} for f in findings],
        "hosts": host_of,
        "backend": backend,
        "start": start,
        "errors": tally["error"],
        "warnings": tally["warning"],
    }
    print(json.dumps(report, indent=2) if options.json else in_words(report, findings, host_of), flush=True)
    return 1 if tally["error"] else 0
