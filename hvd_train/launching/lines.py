"""The command that each launcher needs, word by word; nothing here starts anything.

All place the ranks in the order of the hosts, fill one after the other, and tie no rank to a core: hvd_train
counts its threads from the cores that a rank may use, divided among the ranks that share them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvd_train.environment import mpi_build
from hvd_train.environment.mpi_launcher import MPILauncher
from hvd_train.launching.hosts import Host

KEEPALIVE = {"time": 5, "intvl": 1, "probes": 3}
"""TCP keepalive: seconds of silence before the first probe, seconds between two probes, and how many may stay
unanswered. With Open MPI's defaults a disconnected host is noticed only after many minutes."""

FAILURE_DETECTOR = {
    "mpi_ft_detector": "true",
    "mpi_ft_detector_period": "60",
    "mpi_ft_detector_timeout": "300",
}
"""Seconds between two heartbeats of a rank, and without one until it counts as dead. A rank sends them only
while it is inside MPI: one whose local steps or evaluation took longer than the timeout would count as dead,
and crash. So it is the time after which a rank counts as hung anyway. The detector's own thread
(mpi_ft_detector_thread), which would allow a few seconds, leaves MPI_Finalize hanging in Open MPI 5.0.11. A
killed rank is noticed at once without any of this."""

_EXPORTED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "OPAL_PREFIX")
_EXPORTED_BEGINNINGS = (
    *("HVD_TRAIN_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH_", "HDF5_", "HOROVOD_"),
    *("MPI4PY_", "UCX_", "FI_", "MPIR_", "I_MPI_"),
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command, and the variables that it needs in its environment beside those that are there."""

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={value}" for name, value in self.environ.items()]
        return shlex.join([*(["env", *settings] if settings else []), *self.argv])


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be started, whoever starts it."""

    program: tuple[str, ...]
    """What each rank runs: an absolute path and its arguments."""

    ranks: int

    hosts: tuple[Host, ...] = ()
    """With as many slots as there are ranks; empty where the launcher asks Slurm."""

    interface: str = ""
    """The network interface between hosts, by its name; empty to let the launcher choose."""

    network: str = ""
    """The same, or the address of its network, for launchers that take one."""

    shares_cores: bool = False
    """Whether more ranks run on this host than it has cores."""

    more: tuple[str, ...] = ()
    """Options of the launcher that the user gave."""

    @property
    def leaves_this_host(self) -> bool:
        """Whether there may be ranks on another host."""
        return [host.name for host in self.hosts] != ["localhost"]

    @property
    def placement(self) -> str:
        """`h1:2,h2:2`."""
        return ",".join(map(str, self.hosts))

    def says(self, *names: str) -> bool:
        """Whether the user's own options or environment decide something, by any of these names."""
        return any(name in word for word in (*self.more, *os.environ) for name in names)


def exported(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables in `environ` that ranks on all hosts get."""
    return sorted(name for name in environ if name in _EXPORTED or name.startswith(_EXPORTED_BEGINNINGS))


def allow_root(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Open MPI refuses to run as root by default. In a container root is often the only user, so it is
    allowed here; PRTE_ is for Open MPI 5."""
    if os.getuid() != 0:
        return {}
    names = [f"{mpi}_ALLOW_RUN_AS_ROOT{end}" for mpi in ("OMPI", "PRTE") for end in ("", "_CONFIRM")]
    return {name: "1" for name in names if environ.get(name) != "1"}


def open_mpi(request: Request, mpirun: str, version: str, tolerant: bool = False) -> Line:
    """mpirun of Open MPI 4 or 5; `tolerant` only of 5."""
    words = [mpirun]
    environ = {**allow_root(), **_home_of(mpirun)}
    if environ.get("OPAL_PREFIX"):
        words += ["--prefix", environ["OPAL_PREFIX"]]
    if request.hosts:
        words += ["--host", request.placement]
    words += ["-np", str(request.ranks)]
    if not request.says("map-by", "rmaps_"):
        words += ["--map-by", "slot"]
    if not request.says("bind-to", "cpus-per-proc"):
        words += ["--bind-to", "none"]
    if tolerant:
        words += ["--with-ft", "ulfm", *_options("--mca", FAILURE_DETECTOR)]
    mpi, daemons = _open_mpi_parameters(request)
    words += _options("--mca", mpi) + _options("--prtemca" if _is_5(version) else "--mca", daemons)
    for name in exported({**os.environ, **environ}):
        words += ["-x", name]
    return Line(argv=(*words, *request.more, *request.program), environ=environ)


def hydra(request: Request, mpirun: str, is_intel: bool) -> Line:
    """mpirun of MPICH, and of Intel MPI, which is made from it."""
    environ = {"I_MPI_PIN": "0"} if is_intel and "I_MPI_PIN" not in os.environ else {}
    if request.interface and not request.says("FI_TCP_IFACE"):
        environ["FI_TCP_IFACE"] = request.interface
    words = [mpirun]
    if request.interface and not request.says("-iface"):
        words += ["-iface", request.interface]
    words += ["-genvlist", ",".join(exported({**os.environ, **environ})), *request.more]
    if not is_intel or not request.hosts:
        hosts = ["-hosts", request.placement] if request.hosts else []
        return Line(argv=(*words, *hosts, "-np", str(request.ranks), *request.program), environ=environ)
    # Intel's -hosts takes no number of ranks: one section for each host.
    for i, host in enumerate(request.hosts):
        words += [*([":"] if i else []), "-host", host.name, "-n", str(host.slots), *request.program]
    return Line(argv=tuple(words), environ=environ)


def horovodrun(request: Request, program: str, mpirun: str, launcher: MPILauncher, gloo: bool) -> Line:
    """horovodrun over `mpirun`, which `launcher` identifies, or over Gloo.

    It writes mpirun's options itself and passes its own environment on: settings for mpirun are variables.
    """
    environ = allow_root()
    tools = list(dict.fromkeys(str(Path(p).parent) for p in (mpirun, program) if p))
    path = os.environ.get("PATH", os.defpath)
    # It takes the first mpirun on PATH.
    if path.split(os.pathsep)[: len(tools)] != tools:
        environ["PATH"] = os.pathsep.join([*tools, path])
    if launcher.family == "Open MPI" and not gloo:
        environ |= _home_of(mpirun)
        mpi, daemons = _open_mpi_parameters(request)
        environ |= {f"OMPI_MCA_{name}": value for name, value in mpi.items()}
        prefix = "PRTE_MCA_" if _is_5(launcher.version) else "OMPI_MCA_"
        environ |= {f"{prefix}{name}": value for name, value in daemons.items()}
    words = [program, *(["--gloo"] if gloo else []), "-np", str(request.ranks), "-H", request.placement]
    if request.interface and not request.says("--network-interface"):
        words += ["--network-interfaces", request.interface]
    return Line(argv=(*words, *request.more, *request.program), environ=environ)


def srun(request: Request, program: str, mpi_type: str) -> Line:
    """srun; `mpi_type` is empty for the site's default."""
    environ = {}
    if request.network and not request.says("btl_tcp_if_"):
        environ["OMPI_MCA_btl_tcp_if_include"] = request.network
    # sbatch's --cpus-per-task does not reach srun by itself (Slurm 22.05 and later).
    if "SLURM_CPUS_PER_TASK" in os.environ and "SRUN_CPUS_PER_TASK" not in os.environ:
        environ["SRUN_CPUS_PER_TASK"] = os.environ["SLURM_CPUS_PER_TASK"]
    words = [program, "--ntasks", str(request.ranks), "--export=ALL"]
    if mpi_type and not request.says("--mpi"):
        words += [f"--mpi={mpi_type}"]
    # Ranks leave together, through MPI_Finalize. When one is gone, the others have 10 s: long enough for a
    # last message, which --kill-on-bad-exit would cut off, and the step does not hang on a killed rank.
    if not request.says("--wait"):
        words += ["--wait=10"]
    return Line(argv=(*words, *request.more, *request.program), environ=environ)


def _open_mpi_parameters(request: Request) -> tuple[dict[str, str], dict[str, str]]:
    """MCA parameters of the ranks, and of the launcher's daemons."""
    mpi: dict[str, str] = {}
    daemons: dict[str, str] = {}
    if request.network and not request.says("btl_tcp_if_"):
        mpi["btl_tcp_if_include"] = request.network
    if request.network and not request.says("oob_tcp_if_"):
        daemons["oob_tcp_if_include"] = request.network
    if request.leaves_this_host and not request.says("oob_tcp_keepalive"):
        daemons |= {f"oob_tcp_keepalive_{name}": str(value) for name, value in KEEPALIVE.items()}
    if request.shares_cores and not request.says("mpi_yield_when_idle"):
        mpi["mpi_yield_when_idle"] = "1"
    return mpi, daemons


def _home_of(mpirun: str) -> dict[str, str]:
    home = mpi_build.home_if_moved(mpirun)
    return {"OPAL_PREFIX": home} if home else {}


def _is_5(version: str) -> bool:
    return int(version.split(".")[0]) >= 5


def _options(flag: str, parameters: Mapping[str, str]) -> list[str]:
    return [word for name, value in parameters.items() for word in (flag, name, value)]
