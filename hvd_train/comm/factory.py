"""Chooses the backend. The only place that knows all of them."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hvd_train._version import __version__
from hvd_train.comm.agree import attempt, require_equal
from hvd_train.comm.base import Communicator
from hvd_train.environment.launcher import detect, mismatch
from hvd_train.errors import EnvironmentMismatch, RanksDisagree
from hvd_train.liveness import STALL_TIMEOUT_S, Liveness

if TYPE_CHECKING:
    from hvd_train.comm.ring import RingCommunicator

_BASE = {"mpi": "mpi", "gloo": "horovod", "nothing": "solo"}
"""By what the launcher provides: the backend that needs nothing else, and brings the ring up."""


def connect(
    backend: str = "auto",
    wire: str = "float32",
    *,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    step_timeout_s: float = 0.0,
    shared_folder: str | Path | None = None,
) -> Communicator:
    """The communicator of this job. Collective where the job has several processes.

    Args:
        backend: `auto`, `solo`, `mpi`, `horovod` or `ring`. `auto` takes ring where an MPI launcher started
            the process, or mpi where ring is not built on some rank; horovod where horovodrun started it
            without MPI, solo where nothing did.
        wire: what carries an element between hosts under `ring`: `float32`, `bfloat16`, `float16`, `int8`.
        stall_timeout_s: seconds without progress after which a rank that others wait for is given up.
        step_timeout_s: seconds without a finished step after which even a busy rank is given up; 0: never.
        shared_folder: a folder that all hosts see. Each rank leaves a sign of life there, and more of them in
            long steps. Where not all ranks of several hosts see it, they wait for `stall_timeout_s`, or for
            longer after longer rounds.

    Raises:
        LauncherMismatch: a launcher started this process as one of several and its world has another size.
        RanksDisagree: the ranks run different versions of hvd_train, Python, torch or MPI.
        EnvironmentMismatch: the backend is not installed, or it has no such wire.
    """
    launcher = detect()
    base = _BASE[launcher.provides]
    comm = _make(base if backend in ("auto", "ring") else backend, Liveness(stall_timeout_s, step_timeout_s))
    if not launcher.promised(comm.size):
        comm.close()
        raise mismatch(launcher, comm.name, comm.library, comm.size)
    try:
        # Before the ring is set up: other versions may do that differently, and wait for each other.
        require_equal(comm, "versions", versions(comm), "Install the same on every host.")
    except RanksDisagree:
        comm.close()
        raise
    comm.share_signs(None if shared_folder is None else Path(shared_folder))
    if backend == "ring" or (backend == "auto" and base == "mpi"):
        comm = _ring_over(comm, wire, required=backend == "ring")
    if wire != "float32" and comm.name not in ("ring", "solo"):
        raise _close(
            comm,
            f"backend `{comm.name}` carries float32 between hosts, not {wire}. Choose `--backend ring`, or "
            "leave `--wire` out.",
        )
    return comm


def versions(comm: Communicator) -> dict[str, str]:
    """Of what must be the same on every rank, as this one has it."""
    return {
        "hvd_train": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mpi": comm.library,
    }


def _ring_over(inner: Communicator, wire: str, required: bool) -> Communicator:
    """The ring, brought up by `inner`; `inner` itself where it cannot be and need not. Collective."""
    tried = attempt(inner, _ring)
    missing = tried.why(EnvironmentMismatch)
    try:
        if tried.value is None or missing:
            raise EnvironmentMismatch(missing)
        return tried.value(inner, wire)
    except EnvironmentMismatch as error:
        if required:
            raise _close(inner, str(error)) from None
    return inner


def _ring() -> type[RingCommunicator]:
    """Raises `EnvironmentMismatch` where it is not built."""
    try:
        from hvd_train.comm.ring import RingCommunicator
    except ImportError as error:
        raise EnvironmentMismatch(
            f"the backend `ring` is not built ({error}): build the package, as `make setup` does"
        ) from None
    return RingCommunicator


def _close(comm: Communicator, message: str) -> EnvironmentMismatch:
    """The error to raise where each of the processes finds the same."""
    comm.close()
    return EnvironmentMismatch(message, agreed=True)


def _make(name: str, liveness: Liveness) -> Communicator:
    if name == "solo":
        from hvd_train.comm.solo import SoloCommunicator

        return SoloCommunicator(liveness)
    if name == "mpi":
        from hvd_train.comm.mpi import MPICommunicator

        return MPICommunicator(liveness)
    from hvd_train.comm.horovod import HorovodCommunicator

    return HorovodCommunicator(liveness)
