"""A training in which one rank stops, sleeps or computes for long, the second time that it enters a phase
(the first time in phases that come once). Runs on every rank: see test_hangs.py.

Arguments: what the rank does (one of `ACTIONS`), the rank, the phase, and the options of the training.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from hvd_train import liveness
from hvd_train.cli import main
from hvd_train.environment.launcher import detect

ONCE = ("set-up", "final report")
COMPUTES_S = 10.0


def compute(seconds: float) -> None:
    """Keeps the core busy, for so much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pow(3, 200_001)  # some milliseconds in C, with the interpreter's lock


ACTIONS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1e6),
    "compute": lambda: compute(COMPUTES_S),
    "spin": lambda: compute(1e6),
}


def install(action: str, rank: int, phase: str) -> None:
    """Replaces `liveness.phase`, before anything has imported it, on the rank that is to stumble."""
    report, left = liveness.phase, 1 if phase in ONCE else 2

    def stumbling(name: str) -> None:
        nonlocal left
        report(name)
        if name == phase:
            left -= 1
            if left == 0:
                ACTIONS[action]()

    if detect().rank == rank:
        liveness.phase = stumbling


if __name__ == "__main__":
    install(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.exit(main(sys.argv[4:]))
