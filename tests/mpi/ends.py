"""A program of a user's own that ends in one of several ways: `ends.py WAY BACKEND`. For test_ends.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

import hvd_train
from hvd_train.comm.base import Communicator, Op

BACKEND = sys.argv[2]


def meet(comm: Communicator) -> None:
    """All ranks; the sum is their number."""
    assert comm.allreduce(np.ones(1), Op.SUM) == comm.size


def on_all_ranks(code: object) -> None:
    with hvd_train.connect(BACKEND) as comm:
        meet(comm)
        sys.exit(code)  # type: ignore[arg-type]


def on_one_rank(code: int) -> None:
    with hvd_train.connect(BACKEND) as comm:
        meet(comm)
        if comm.rank == 1:
            sys.exit(code)
        if code:  # rank 1 does not come
            meet(comm)
    print("the other rank came to its end", flush=True)


def interrupted() -> None:
    with hvd_train.connect(BACKEND) as comm:
        meet(comm)
        if comm.rank == 1:
            raise KeyboardInterrupt
        meet(comm)


def raised_without_with() -> None:
    comm = hvd_train.connect(BACKEND)
    meet(comm)
    if comm.rank == 1:
        raise ValueError("of rank 1 alone")
    meet(comm)


def raised_between_two() -> None:
    with hvd_train.connect(BACKEND) as comm:
        meet(comm)
    if comm.rank == 1:
        raise ValueError("of rank 1 alone")
    with hvd_train.connect(BACKEND) as comm:
        meet(comm)


def never_closed() -> None:
    for _ in range(2):
        meet(hvd_train.connect(BACKEND))
    if BACKEND != "horovod":
        from mpi4py import MPI

        assert MPI.Is_initialized()
        assert not MPI.Is_finalized()
    print("both met", flush=True)


WAYS: dict[str, Callable[[], None]] = {
    "all 0": lambda: on_all_ranks(0),
    "all 3": lambda: on_all_ranks(3),
    "all text": lambda: on_all_ranks("not good enough"),
    "one 0": lambda: on_one_rank(0),
    "one 3": lambda: on_one_rank(3),
    "interrupted": interrupted,
    "without with": raised_without_with,
    "between": raised_between_two,
    "never closed": never_closed,
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
