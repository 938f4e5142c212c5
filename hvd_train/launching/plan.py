"""Decides what is started: how many ranks, where, by which launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from hvd_train.environment import machine, mpi_build
from hvd_train.environment.mpi_launcher import SRUN_TYPES, MPILauncher
from hvd_train.errors import ConfigError, EnvironmentMismatch
from hvd_train.launching import lines, network, programs, slurm
from hvd_train.launching.hosts import Host
from hvd_train.launching.lines import Line, Request
from hvd_train.launching.options import Options

FAULT_TOLERANCE_COSTS = (
    "fault tolerance is on: ranks of different hosts communicate over TCP, as Open MPI turns the transports "
    "of fast fabrics (UCX, libfabric, InfiniBand) off; a rank that calls no MPI for 300 s counts as dead; a "
    "lost host still ends the job"
)


def line(options: Options, launcher: str, program: Sequence[str]) -> Line:
    """What starts `program` on every rank by `launcher`. Raises `UserError` for what cannot be started."""
    if options.fault_tolerance and launcher != "mpirun":
        raise EnvironmentMismatch(
            f"--fault-tolerance under {launcher}: only mpirun of Open MPI 5 keeps a job running after "
            "the loss of a rank. Use --launcher mpirun, or leave it out."
        )
    if launcher == "srun":
        return _srun(options, program)
    # Inside an allocation mpirun asks Slurm where to start them; horovodrun knows nothing of it.
    from_slurm = slurm.in_allocation() and not options.named_hosts
    if launcher == "mpirun":
        return _mpirun(options, program, from_slurm)
    ranks = _num_ranks(options, from_slurm)
    hosts = placed(slurm.hosts() if from_slurm else options.named_hosts, ranks)
    request = _request(options, program, ranks, hosts, hosts)
    # A package that was built without an MPI runs over Gloo, which horovodrun finds out by itself.
    without = options.gloo or mpi_build.load().mpi is None
    mpirun, family = ("", MPILauncher("", "")) if without else programs.mpirun()
    if not family.known_to_horovodrun:
        raise EnvironmentMismatch(
            f"horovodrun takes {mpirun} of {family} for an unknown MPI: it looks for `MPICH` in what `mpirun "
            "--version` prints, and this one does not print it. Use --launcher mpirun, or --gloo."
        )
    return lines.horovodrun(request, programs.horovodrun(), mpirun, family, options.gloo)


def choose(options: Options) -> str:
    """`mpirun`, `horovodrun` or `srun`."""
    if options.launcher != "auto":
        return options.launcher
    if not slurm.in_allocation() or options.named_hosts or options.fault_tolerance:
        return "mpirun"
    family = _family()
    site_decides = "SLURM_MPI_TYPE" in os.environ
    fits = site_decides or (family in ("Open MPI", "") and "pmix" in slurm.mpi_types())
    return "srun" if fits else "mpirun"


def _family() -> str:
    """Of the recorded MPI; empty if none was recorded."""
    recorded = mpi_build.load().mpi
    return "" if recorded is None else mpi_build.parse_version(recorded.version)[0]


def _srun(options: Options, program: Sequence[str]) -> Line:
    if options.named_hosts:
        raise ConfigError(
            "--launcher srun with --hosts or --hostfile: srun starts ranks on the hosts of its allocation. "
            "Leave them out, or use --launcher mpirun."
        )
    path = programs.srun()
    request = _request(options, program, _num_ranks(options, True), (), _allocated())
    mpi_type = "" if "SLURM_MPI_TYPE" in os.environ else SRUN_TYPES.get(_family() or "Open MPI", "")
    known = slurm.mpi_types()
    if mpi_type and known and mpi_type not in known and not request.says("--mpi"):
        raise EnvironmentMismatch(
            f"srun knows no --mpi={mpi_type}, which {_family() or 'Open MPI'} needs: `srun --mpi=list` names "
            f"{', '.join(sorted(known))}. Use --launcher mpirun."
        )
    return lines.srun(request, path, mpi_type)


def _mpirun(options: Options, program: Sequence[str], from_slurm: bool) -> Line:
    path, launcher = programs.mpirun()
    is_open_mpi = launcher.family == "Open MPI"
    if options.fault_tolerance and not (is_open_mpi and launcher.version.split(".")[0] >= "5"):
        raise EnvironmentMismatch(
            f"--fault-tolerance with {path} of {launcher}: only Open MPI 5 keeps a job running after the "
            "loss of a rank. Leave it out, or build the package with Open MPI 5."
        )
    ranks = _num_ranks(options, from_slurm)
    hosts = () if from_slurm else placed(options.named_hosts, ranks)
    request = _request(options, program, ranks, hosts, _allocated() if from_slurm else hosts)
    if is_open_mpi:
        return lines.open_mpi(request, path, launcher.version, options.fault_tolerance)
    if hosts == (Host("localhost", ranks),):
        request = replace(request, hosts=())  # Hydra's default, and one that needs no ssh
    return lines.hydra(request, path, is_intel=launcher.family == "Intel MPI")


def _allocated() -> tuple[Host, ...]:
    """The hosts of the allocation; none if they are unknown: they only serve to choose a network."""
    try:
        return slurm.hosts() if slurm.in_allocation() else ()
    except EnvironmentMismatch:
        return ()


def _num_ranks(options: Options, from_slurm: bool) -> int:
    slots = sum(host.slots for host in options.named_hosts)
    ranks = options.ranks or (slurm.num_tasks() if from_slurm else slots)
    if not ranks:
        where = (
            "the Slurm allocation has no number of tasks"
            if from_slurm
            else "the number of ranks is not given"
        )
        raise ConfigError(f"{where}: expected -np N{'' if from_slurm else ', or --hosts H1:2,H2:2'}.")
    return ranks


def placed(hosts: Sequence[Host], ranks: int) -> tuple[Host, ...]:
    """The hosts that get ranks, each with as many slots as it gets: one is filled after the other. Without
    hosts it is this one.

    Raises `ConfigError` if there are more ranks than slots.
    """
    if not hosts:
        return (Host("localhost", ranks),)
    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        raise ConfigError(
            f"-np {ranks}, but {', '.join(map(str, hosts))} have {slots} slots: expected at most one "
            "rank per slot. Raise the number after a host's name, or lower -np."
        )
    found: list[Host] = []
    for host in hosts:
        here = min(host.slots, ranks - sum(h.slots for h in found))
        if here:
            found.append(Host(host.name, here))
    return tuple(found)


def _request(
    options: Options, program: Sequence[str], ranks: int, hosts: tuple[Host, ...], all_hosts: tuple[Host, ...]
) -> Request:
    """`all_hosts` are those that ranks may run on, where `hosts` leaves that to Slurm."""
    found = None if options.interface else network.leading_to_others(host.name for host in all_hosts)
    here = next((host.slots for host in all_hosts if network.is_this_host(host.name)), 0)
    return Request(
        program=tuple(program),
        ranks=ranks,
        hosts=hosts,
        interface=options.interface or (found.interface if found else ""),
        network=options.interface or (found.network if found else ""),
        shares_cores=here > len(machine.AFFINITY),
        more=options.more,
    )
