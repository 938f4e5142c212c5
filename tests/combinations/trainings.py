"""Short trainings of rules by the program itself."""

from __future__ import annotations

import hvd_train
from hvd_train.comm.base import Communicator
from tests.combinations.rules import config, sync


def trains(comm: Communicator, runs: str, *rules: str, wire: str = "float32", rounds: int = 3) -> None:
    """A run of some rules together; it goes on where it has some rounds already. Collective."""
    name = "-".join((*rules, wire)).replace(" ", "-")
    backend = "ring" if wire != "float32" else "auto"
    wanted = config(runs, name, sync(*rules, wire=wire), rounds, backend)
    assert hvd_train.train(wanted, comm=comm).reason == "max_rounds"
