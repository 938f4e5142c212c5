"""MPI's control variables, of the library that mpi4py has loaded. mpi4py does not wrap them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_THREAD_SINGLE = 0

_Value = ctypes.c_int * 2
"""Room for the longest integer type that a variable may have; the value is the first, the second stays 0."""


def read(mpi: Any, name: str) -> int | None:
    """The value of an integer or boolean variable; None where the library has none of that name.

    After `_mpi.start`: Open MPI 5.0 crashes in MPI_Init when variables were asked for before it.
    """
    with _variable(mpi, name) as (library, handle):
        value = _Value(0, 0)
        if handle is None or library.MPI_T_cvar_read(handle, ctypes.byref(value)) != mpi.SUCCESS:
            return None
        return int(value[0])


def write(mpi: Any, name: str, value: int) -> bool:
    """Sets an integer or boolean variable on this rank. Returns whether the library took it; communicators
    made before may go on as they were. After `_mpi.start`."""
    with _variable(mpi, name) as (library, handle):
        if handle is None:
            return False
        return bool(library.MPI_T_cvar_write(handle, ctypes.byref(_Value(value, 0))) == mpi.SUCCESS)


@contextmanager
def _variable(mpi: Any, name: str) -> Iterator[tuple[Any, ctypes.c_void_p | None]]:
    """The library, and a handle of the variable or None."""
    library = _library(mpi)
    if library is None:
        yield library, None
        return
    index, handle, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    found = library.MPI_T_cvar_get_index(name.encode(), ctypes.byref(index)) == mpi.SUCCESS
    allocate = library.MPI_T_cvar_handle_alloc
    found &= found and allocate(index, None, ctypes.byref(handle), ctypes.byref(count)) == mpi.SUCCESS
    try:
        yield library, handle if found and count.value == 1 else None
    finally:
        if found:
            library.MPI_T_cvar_handle_free(ctypes.byref(handle))


@cache
def _library(mpi: Any) -> Any | None:
    """The library with its tools interface ready, until the process ends: MPI_T_finalize of MPICH 4.3 frees
    strings that its collectives go on to read. None if it has no such interface."""
    # mpi4py's module depends on the library: its symbols are found through it, wherever the library is.
    library = ctypes.CDLL(mpi.__file__)
    provided = ctypes.c_int()
    ready = library.MPI_T_init_thread(_THREAD_SINGLE, ctypes.byref(provided)) == mpi.SUCCESS
    return library if ready else None
