"""What must be loaded to be known. Only for a child process: a library that does not fit may end it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hvd_train.comm import _mpi, _mpi_t, _ulfm
from hvd_train.environment import mpi_build
from hvd_train.environment.launcher import Launcher
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.doctor import software
from hvd_train.tools.doctor.check import Check

DEBUG_VARIABLES = {
    "OMPI_MCA_ompi_display_comm": "mpi_init",  # Open MPI 5.0: a table of the transports between ranks
    "MPIR_CVAR_DEBUG_SUMMARY": "1",  # MPICH: the netmod, and libfabric's provider
    "I_MPI_DEBUG": "4",  # Intel MPI: the provider
}
"""Variables with which each MPI, in MPI_Init, prints its choice of transports on standard output."""

_PMLS = ("ob1", "cm", "ucx")
_BTLS = ("sm", "vader", "tcp", "ofi", "uct", "openib")


def torch() -> Check:
    """Whether torch loads."""
    try:
        module: Any = import_module("torch")
    except ImportError as error:
        remedy = "`pip install torch`, or `make setup`; training needs it."
        return Check(name="torch", status="error", seen=f"cannot be imported: {error}", remedy=remedy)
    version = str(module.__version__)
    seen = f"{version}, for CPUs with {module.backends.cpu.get_cpu_capability()}"
    return Check(name="torch", seen=seen, alike=version)


def shm() -> Check:
    """The ring's part within a host."""
    return _extension(
        "_shm", "ring in a host", "`auto` takes mpi. For the ring install the package with cmake and c++."
    )


def ring() -> Check:
    """The ring's part between hosts; after MPI was loaded, which it needs."""
    remedy = "One host does not need it. For several install the package with mpicxx of the same MPI on PATH."
    return _extension("_ring", "ring of hosts", remedy)


def _extension(module: str, name: str, remedy: str) -> Check:
    try:
        loaded = import_module(f"hvd_train.comm.{module}")
    except ImportError as error:
        return Check(name=name, status="warning", seen=f"{module} cannot be imported: {error}", remedy=remedy)
    return Check(name=name, seen=f"{module} is built, {Path(str(loaded.__file__)).name}")


def mpi_library(launcher: Launcher) -> tuple[Check, Any]:
    """Loads MPI, which is not initialised; the module mpi4py.MPI, or None where it cannot be."""
    try:
        mpi = _mpi.load()
    except EnvironmentMismatch as error:
        needed = launcher.provides == "mpi" or mpi_build.load().mpi is not None
        return Check(name="MPI", status="error" if needed else "warning", seen=str(error)), None
    version = mpi_build.short_version(mpi.Get_library_version())
    return Check(
        name="MPI", seen=f"{version}, {_loaded_from() or 'library not found in /proc'}", alike=version
    ), mpi


def mpirun(mpi: Any, launcher: Launcher) -> Check:
    """See `software.mpirun`."""
    recorded = mpi_build.load().mpi
    version = mpi.Get_library_version() if mpi else recorded.version if recorded else ""
    return software.mpirun(version, launcher)


def _loaded_from() -> str:
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = (re.search(r"/\S*/libmpi(?:_abi)?\.so\S*", line) for line in lines)
    return next((match[0] for match in found if match), "")


def horovod() -> Check:
    """How Horovod was built: what `horovodrun --check-build` prints, for torch alone."""
    version = software.installed("horovod")
    if not version:
        remedy = (
            "Only horovodrun and `--backend horovod` use it: `make setup` builds it, or prints why it cannot."
        )
        return Check(name="Horovod", status="warning", seen="not installed", remedy=remedy)
    try:
        from hvd_train.comm.horovod import load

        hvd = load()
    except EnvironmentMismatch as error:
        return Check(name="Horovod", status="warning", seen=str(error))
    except ImportError as error:
        seen = f"{version}, which cannot be loaded without torch: {error}"
        return Check(name="Horovod", status="warning", seen=seen, remedy="See torch.")
    over = [word for word, built in (("MPI", hvd.mpi_built()), ("Gloo", hvd.gloo_built())) if built]
    if over:
        return Check(name="Horovod", seen=f"{version}, built with {' and '.join(over)}", alike=version)
    remedy = "Build it again with HOROVOD_WITH_GLOO=1, or with an MPI: `make setup`."
    return Check(name="Horovod", status="error", seen=f"{version}, with neither MPI nor Gloo", remedy=remedy)


def fault_tolerance(mpi: Any, fabrics: Sequence[str]) -> Check:
    """Whether a killed rank is survived, and what that costs. After MPI_Init."""
    name = "fault tolerance"
    family, version = mpi_build.parse_version(mpi.Get_library_version())
    cost = "it restricts MPI to shared memory and TCP, without the transports of fast networks"
    if _ulfm.is_on(mpi):
        seen = f"on: the other ranks go on after a loss; {cost}"
        if not fabrics:
            return Check(name=name, seen=seen)
        remedy = f"Leave `--with-ft ulfm` out to use {', '.join(fabrics)}; a killed rank then ends the job."
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    if family == "Open MPI" and int(version.partition(".")[0]) >= 5:
        seen = f"off: a killed rank ends the job. `mpirun --with-ft ulfm` turns it on: {cost}. srun cannot"
        return Check(name=name, seen=seen)
    return Check(name=name, seen="off: a killed rank ends the job. Only Open MPI 5 can turn it on")


def transports(mpi: Any, said: str, fabrics: Sequence[str]) -> Check:
    """What moves messages. After MPI_Init, on rank 0 of several.

    Args:
        said: what MPI printed in MPI_Init with the variables of `DEBUG_VARIABLES`.
        fabrics: adapters of fast networks.
    """
    version = mpi.Get_library_version()
    if "Open MPI" in version:
        pmls, btls = (
            [x for x in names if _mpi_t.read(mpi, f"{kind}_{x}_{variable}") is not None]
            for kind, names, variable in (("pml", _PMLS, "priority"), ("btl", _BTLS, "exclusivity"))
        )
        return check_open_mpi(said, pmls, btls, fabrics)
    return check_mpich(version, said)


def check_open_mpi(said: str, pmls: Sequence[str], btls: Sequence[str], fabrics: Sequence[str]) -> Check:
    """Of Open MPI: from its table, else from the components that are still open after MPI_Init."""
    name = "transports"
    pml = f"PML {', '.join(pmls) or 'unknown'}"
    within, between = (_summary(said, place) for place in ("on-host", "off-host"))
    if not within:
        return Check(name=name, seen=f"{pml}, BTL {', '.join(btls) or 'unknown'} are open")
    places = [f"within a host {within}"] if within != "n/a" else []
    places += [f"between hosts {between}"] if between not in ("", "n/a") else []
    seen = f"{', '.join(places)}; {pml}"
    if fabrics and "tcp" in between:
        remedy = "Give `--mca pml ucx` or `--mca pml cm --mca mtl ofi`; fault tolerance must be off."
        seen = f"{seen}, though there are {', '.join(fabrics)}"
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    return Check(name=name, seen=seen)


def _summary(said: str, place: str) -> str:
    found = re.search(rf"{place}:\s+(?:all connections are )?(.+)", said)
    return found[1].strip() if found else ""


def check_mpich(version: str, said: str) -> Check:
    """Of MPICH and its kin."""
    device = re.search(r"MPICH Device:\s+(.+)", version)
    netmod = re.search(r"(\w+) netmod Capability", said)
    provider = re.search(r"libfabric provider: (\S+)", said)
    seen = [f"device {device[1]}"] if device else []
    seen += [f"netmod {netmod[1].lower()}"] if netmod else []
    seen += [f"libfabric's provider {provider[1]}"] if provider else []
    return Check(name="transports", seen=", ".join(seen) or "not reported by this MPI")


def flush_libraries() -> None:
    """Writes out what C libraries have printed."""
    ctypes.CDLL(None).fflush(None)


def set_debug_variables() -> None:
    """Before MPI is loaded."""
    for name, value in DEBUG_VARIABLES.items():
        os.environ.setdefault(name, value)
