"""Open MPI's fault tolerance (ULFM), and what it needs besides. Statements on Open MPI are about 5.0.11.

A rank that finds that another has died revokes their communicator, so that all ranks that wait in it, or
enter it later, get an error. `mpi` is the module mpi4py.MPI, a `comm` one of its communicators.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hvd_train.comm import _mpi_t


def is_on(mpi: Any) -> bool:
    """Whether the surviving ranks can continue after one died: under `mpirun --with-ft ulfm`, which sets this
    variable. That the library has the functions is not enough. After MPI_Init."""
    return bool(_mpi_t.read(mpi, "mpi_ft_enable"))


def is_loss(mpi: Any, error: Exception | None) -> bool:
    """Whether an error of a call says that a rank died, or that another rank has found so."""
    losses = (mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED)
    return isinstance(error, mpi.Exception) and error.Get_error_class() in losses


def is_broken(comm: Any) -> bool:
    """Whether this rank knows of a loss. Check after successful calls, too: MPI_Allgatherv of a few values
    reports success where it failed. Not collective."""
    return bool(comm.Is_revoked() or dead(comm))


def dead(comm: Any) -> list[int]:
    """The ranks that are known to have died, ascending. Not collective."""
    return ranks(comm, comm.Get_failed())


def ranks(comm: Any, group: Any) -> list[int]:
    """The ranks of a group, ascending, as `comm` counts them; frees the group. Not collective."""
    all_ranks = comm.Get_group()
    found: list[int] = sorted(group.Translate_ranks(None, all_ranks))
    all_ranks.Free()
    group.Free()
    return found


GiveUp = Callable[[float], bool]
"""Whether to wait no longer, after so many seconds."""


def agree(mpi: Any, comm: Any, value: int, give_up: GiveUp) -> int | None:
    """Bitwise AND of the values of the surviving ranks; identical on each of them, even if another rank dies
    or the communicator is revoked meanwhile. None after giving up. Collective."""
    while True:
        flag = np.array([value], dtype=np.intc)
        comm.Ack_failed()  # a death that is known by now does not hinder the agreement
        request = comm.Iagree(flag)
        try:
            if wait(request.Test, give_up):
                return int(flag[0])
            abandon(request, flag)
            return None
        except mpi.Exception as error:
            if not is_loss(mpi, error):
                raise


def all_went_well(mpi: Any, comm: Any, well: bool, give_up: GiveUp) -> bool | None:
    """Whether a call went well on every surviving rank; not so where one of them has come to `meet` instead.
    None after giving up. Collective, after the call.

    Success on one rank alone says little: collectives of Open MPI were seen to succeed, with undefined
    values, when a peer died. A rank that died before it had done its part is known to be dead after this.
    """
    flags = agree(mpi, comm, _encode(-1, calling=True, well=well), give_up)
    return None if flags is None else bool(flags & _WELL)


def meet(mpi: Any, comm: Any, value: int, give_up: GiveUp) -> int | None:
    """As `agree`, of small values, among ranks that know of a loss. It waits for those that still ask whether
    a call went well: it did not, and then they come here. Collective."""
    while True:
        flags = agree(mpi, comm, _encode(value, calling=False, well=False), give_up)
        if flags is None:
            return None
        if flags & _ALL_MEET:
            return flags >> 2


_WELL, _ALL_MEET = 1, 2

_SPINS = 50
"""Polls before the first pause: a message between ranks of one host takes a few microseconds."""

_YIELDS_S, _NAP_S = 0.02, 1e-4
"""How long a wait only yields, and how long it sleeps between two polls after that."""


def _encode(value: int, *, calling: bool, well: bool) -> int:
    return value << 2 | (0 if calling else _ALL_MEET) | (_WELL if well else 0)


def wait(done: Callable[[], bool], give_up: GiveUp) -> bool:
    """Polls `done` until it holds or `give_up` does. MPI makes progress in these polls alone: for the time of
    a small message this offers its core to others in between, and only then sleeps."""
    for _ in range(_SPINS):
        if done():
            return True
    began = time.monotonic()
    while not done():
        waited_s = time.monotonic() - began
        if give_up(waited_s):
            return False
        if waited_s < _YIELDS_S:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)
    return True


_abandoned: list[tuple[Any, ...]] = []


def abandon(*used: Any) -> None:
    """Keeps requests that were given up, and the memory that MPI continues to use, until the process ends."""
    _abandoned.append(used)
