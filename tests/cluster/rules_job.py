"""Rounds of every rule with every wire, on every rank of a job on several hosts: see
test_rules_between_hosts.py. Rank 0 prints what has run, as JSON. Rounds compare the bits of all ranks."""

from __future__ import annotations

import json
import sys

from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import WIRES, RingCommunicator
from tests.combinations.rounds import Rounds
from tests.combinations.rules import RULES, config, sync
from tests.combinations.table import refused_on


def main() -> None:
    ran = []
    with MPICommunicator() as inner:
        for wire in WIRES:
            comm = RingCommunicator(inner, wire)
            for rule in RULES:
                if refused_on(rule, "ring", wire):
                    continue
                rounds = Rounds(comm, config("runs", "r", sync(rule, wire=wire)))
                for _ in range(3):
                    rounds.round()
                ran.append((comm.num_hosts, wire, rule))
        if inner.rank == 0:
            json.dump(ran, sys.stdout)


if __name__ == "__main__":
    main()
