"""The last rank of a job stops, as if it hung; each of the others writes whom it misses to RANK.json, and the
job is ended when all have. Runs on every rank: see test_hangs.py.

Arguments: the backend, what the others call meanwhile (`allreduce` or `average`), and a folder that all see.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hvd_train.comm.base import Communicator, Op
from hvd_train.comm.factory import connect
from hvd_train.errors import BarrierTimeout

TIMEOUT_S = 2.0
"""In place of minutes."""


def main() -> None:
    backend, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    comm = connect(backend)
    buffer = comm.buffer(1000, torch.float32)
    comm.average(buffer, 1.0)
    Communicator.stall_timeout_s = TIMEOUT_S
    if comm.rank == comm.size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        if what == "average":
            comm.average(buffer, 1.0)
        else:
            comm.allreduce(np.ones(3), Op.SUM)
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
