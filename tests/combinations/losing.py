"""One rank of a job that loses a rank, and goes on with every rule: see test_combinations.py. Arguments: the
victim, and a folder in which each survivor writes its report, RANK.json: what each rule says of the loss."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from hvd_train.comm.base import Communicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.errors import ConfigError, RankLost
from tests.combinations.rounds import Rounds
from tests.combinations.rules import RULES, config, sync

BEFORE, AFTER = 3, 3
"""Rounds before the loss, and after it."""


def goes_on(rounds: Rounds, comm: Communicator) -> str:
    """What the rule says of the loss, or why it refuses to go on. Rounds compare the bits of the ranks."""
    try:
        said = rounds.rebind(comm)
    except ConfigError as error:
        return str(error)
    for _ in range(AFTER):
        rounds.round()
    return said


def main() -> None:
    victim, folder = int(sys.argv[1]), Path(sys.argv[2])
    world = MPICommunicator()
    comms = {"ring": RingCommunicator(world), "mpi": world}
    trainings = {
        (name, rule): Rounds(comm, config("runs", "r", sync(rule)))
        for name, comm in comms.items()
        for rule in RULES
    }
    for rounds in trainings.values():
        for _ in range(BEFORE):
            rounds.round()
    if world.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        trainings["ring", "fixed"].round()
    except RankLost:
        survivors = world.survivors()
    comms = {"ring": RingCommunicator(survivors), "mpi": survivors}
    report: dict[str, dict[str, str]] = {name: {} for name in comms}
    for (name, rule), rounds in trainings.items():
        report[name][rule] = goes_on(rounds, comms[name])
    (folder / f"{survivors.rank}.json").write_text(json.dumps(report))
    survivors.close()


if __name__ == "__main__":
    main()
