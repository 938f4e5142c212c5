"""The last rank of a job stops in a collective call, or before it; each of the others writes whom it misses
to RANK.json, and the job is ended when all have. Runs on every rank: see test_hangs.py.

Arguments: the backend, the call (one of `CALLS`), and a folder that all ranks see.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hvd_train.comm.base import Communicator, Op
from hvd_train.comm.buffer import Buffer
from hvd_train.comm.factory import connect
from hvd_train.errors import BarrierTimeout
from hvd_train.liveness import phase

TIMEOUT_S = 2.0
"""In place of minutes."""

CALLS: dict[str, Callable[[Communicator, Buffer], object]] = {
    "allreduce": lambda comm, buffer: comm.allreduce(np.ones(3), Op.SUM),
    "average": lambda comm, buffer: comm.average(buffer, 1.0),
    "slice step": lambda comm, buffer: comm.average(buffer, 1.0, lambda owned, start: stop_if_last(comm)),
    "broadcast": lambda comm, buffer: comm.broadcast(comm.rank, root=comm.size - 1),
    "allgather": lambda comm, buffer: comm.allgather(comm.rank),
    "barrier": lambda comm, buffer: comm.barrier(),
    "buffer": lambda comm, buffer: comm.buffer(100, torch.float32),
    "close": lambda comm, buffer: comm.close(),
}
"""By name; in `slice step` the last rank has come to the call, in the others it has not.
`buffer` is collective in backend ring alone."""


def stop_if_last(comm: Communicator) -> None:
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    backend, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    comm = connect(backend, stall_timeout_s=TIMEOUT_S, shared_folder=folder)
    buffer = comm.buffer(1000, torch.float32)
    comm.average(buffer, 1.0)
    phase("test")
    if what != "slice step":
        stop_if_last(comm)
    began = time.monotonic()
    try:
        CALLS[what](comm, buffer)
    except BarrierTimeout as error:
        found = {"missing": error.missing, "text": str(error), "seconds": time.monotonic() - began}
        part = folder / f"{comm.rank}.part"
        part.write_text(json.dumps(found))
        part.rename(folder / f"{comm.rank}.json")
    while len(list(folder.glob("*.json"))) < comm.size - 1:
        time.sleep(0.02)
    comm.abort(3)


if __name__ == "__main__":
    main()
