"""Every rule runs on a backend, on the ranks of a real job: see test_combinations.py."""

from __future__ import annotations

import pytest

from hvd_train.comm.base import Communicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import CommunicationError
from tests.combinations.rules import RULES
from tests.combinations.trainings import trains


@pytest.mark.parametrize("rule", RULES)
def test_it_runs(world: Communicator, runs: str, rule: str) -> None:
    trains(world, runs, rule)


def test_a_backend_that_cannot_lose_ranks_says_so(world: Communicator) -> None:
    """MPI can only where mpirun was told so, which that of this job was not."""
    expected = r"cannot continue without a lost rank\. Expected backend `ring` or `mpi` on Open MPI 5"
    for comm in (world, SoloCommunicator()):
        with pytest.raises(CommunicationError, match=rf"backend `{comm.name}` \(.*\) {expected}"):
            comm.survivors()
