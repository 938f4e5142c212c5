"""Chooses the backend. The only place that knows all of them."""

from __future__ import annotations

from hvd_train.comm.base import Communicator
from hvd_train.comm.launcher import Launcher, detect
from hvd_train.errors import EnvironmentMismatch

_AUTO = {"mpi": "mpi", "gloo": "horovod", "nothing": "solo"}


def connect(backend: str = "auto") -> Communicator:
    """The communicator of this job. Collective where the job has several processes.

    Args:
        backend: `auto`, `solo`, `mpi`, `horovod` or `ring`. `auto` takes mpi where an MPI launcher started
            the process, horovod where horovodrun did without MPI, solo where nothing did. `ring` is
            brought up by the one that `auto` takes, and wants all ranks on one host.

    Raises:
        EnvironmentMismatch: the backend is not installed, or a launcher started this process as one of
            several and its world has another size.
    """
    launcher = detect()
    by_launcher = _AUTO[launcher.provides]
    comm = _make(by_launcher if backend in ("auto", "ring") else backend)
    if comm.size != launcher.size and launcher.name:
        error = EnvironmentMismatch(_mismatch(comm, launcher))
        error.agreed = True  # each of the processes finds the same
        comm.close()
        raise error
    if backend != "ring":
        return comm
    from hvd_train.comm.ring import RingCommunicator

    return RingCommunicator(comm)


def _make(name: str) -> Communicator:
    if name == "solo":
        from hvd_train.comm.solo import SoloCommunicator

        return SoloCommunicator()
    if name == "mpi":
        from hvd_train.comm.mpi import MPICommunicator

        return MPICommunicator()
    from hvd_train.comm.horovod import HorovodCommunicator

    return HorovodCommunicator()


def _mismatch(comm: Communicator, launcher: Launcher) -> str:
    seen = (
        f"{launcher.name} started this process as one of {launcher.size}, but backend `{comm.name}` "
        f"({comm.library}) sees a world of {comm.size}"
    )
    if comm.name == "solo":
        return f"{seen}. Choose `--backend auto`, or start one process without a launcher."
    return (
        f"{seen}: the launcher belongs to another MPI than the one that this program loads. Start it with "
        "the launcher of the same MPI (`make setup` says which that is), under Slurm with `srun --mpi=pmix`."
    )
