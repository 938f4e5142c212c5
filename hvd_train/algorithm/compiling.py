"""`torch.compile` on all ranks: one rank of each host compiles, the others take the result from its cache."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.errors import EnvironmentMismatch, TaskError
from hvd_train.liveness import phase

_LONGEST_S = 3600.0
"""Seconds that ranks wait for one that compiles: it shows no progress while a compiler works for it."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"

_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch")
"""Where the errors of torch.compile are from; others are those of the model."""


def compile_in_turn(comm: Communicator, compile_it: Callable[[], None]) -> list[float]:
    """Runs `compile_it` on the first rank of each host, then on the others: no two of them compile the same.
    Returns the seconds that it took on each rank. Collective; `compile_it` must not be.

    Raises `SetupFailed` where there is no compiler, no folder for the cache, or the model cannot be compiled.
    """
    phase("compiling")
    together(comm, lambda: _prepare(comm.local_rank))
    seconds = 0.0
    for turn in (0, 1):
        seconds += _take_turn(comm, compile_it if min(comm.local_rank, 1) == turn else None)
    return comm.allgather(seconds)


def _take_turn(comm: Communicator, compile_it: Callable[[], None] | None) -> float:
    """Waits until the ranks that have something to compile are done. Collective."""
    began, failure = time.perf_counter(), None
    try:
        if compile_it is not None:
            compile_it()
    except Exception as error:
        failure = error
    seconds = time.perf_counter() - began if compile_it is not None else 0.0
    comm.barrier(_LONGEST_S)

    def fail() -> None:
        if failure is not None:
            raise _explained(failure) from failure

    together(comm, fail)
    return seconds


def _explained(error: Exception) -> Exception:
    if not type(error).__module__.startswith(_COMPILERS):
        return error
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return TaskError(
        f"model.compile = true: torch.compile failed: {type(error).__name__}: {said} Expected a model that "
        "it can compile, a working C++ compiler, and the headers of Python (Debian and Ubuntu: python3-dev). "
        "Set model.compile = false."
    )


def _prepare(local_rank: int) -> None:
    """What must be so before anything is compiled. Not collective."""
    require_compiler(os.environ)
    if _CACHE not in os.environ:
        os.environ[_CACHE] = str(private_folder(Path(tempfile.gettempdir())))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")  # torch 2.4 has it off
    if local_rank > 0:  # it has nothing to compile, and needs no processes for it
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def require_compiler(environ: Mapping[str, str]) -> None:
    """Raises `EnvironmentMismatch` where the C++ compiler that torch would call is not there."""
    compiler = environ.get("CXX", "g++")
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        raise EnvironmentMismatch(
            f"model.compile = true: the C++ compiler `{compiler}` was not found; torch.compile needs one. "
            "Expected g++ on PATH, or another compiler in the variable CXX. Install it (Debian and Ubuntu: "
            "apt-get install g++ python3-dev), or set model.compile = false."
        )


def private_folder(parent: Path) -> Path:
    """A folder of this user in `parent`, which may be everybody's: what is in it is loaded as code.

    Raises `EnvironmentMismatch` for one that others can write to, or that cannot be made.
    """
    folder = parent / f"hvd_train-compiled-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        seen = folder.lstat()
    except OSError as error:
        raise EnvironmentMismatch(
            f"model.compile = true: {folder}: {error.strerror}. Expected a place for what is compiled. Set "
            f"{_CACHE} to a folder of yours."
        ) from None
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        raise EnvironmentMismatch(
            f"model.compile = true: {folder} has the owner {seen.st_uid} and the mode "
            f"{stat.filemode(seen.st_mode)}; expected a folder that only you can use, as code is loaded from "
            f"it. Remove it, or set {_CACHE} to a folder of yours."
        )
    return folder
