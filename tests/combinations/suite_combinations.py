"""Every combination to which docs/combinations.md says yes runs for some rounds, over MPI and the ring, on
the ranks of a real job: see test_combinations.py. The runs compare the bits of all ranks in every round."""

from __future__ import annotations

from itertools import combinations

import pytest

from hvd_train.comm.base import Communicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import UserError
from tests.combinations.rounds import Rounds
from tests.combinations.rules import RULES, SHORT_WIRES, config, of_one_key, sync
from tests.combinations.table import averages_parameters, refused_parts, refused_wires
from tests.combinations.trainings import trains

PAIRS = [pair for pair in combinations(RULES, 2) if not of_one_key(*pair) and not refused_parts(*pair)]
"""Two rules that go together."""


@pytest.fixture(scope="module")
def ring(world: Communicator) -> Communicator:
    return RingCommunicator(world)


@pytest.mark.parametrize("rule", RULES)
def test_it_runs_on_the_ring_and_is_resumed_by_any_number_of_ranks(
    world: Communicator, ring: Communicator, runs: str, rule: str
) -> None:
    """Gone on with by the same ranks, by one, and by all again."""
    trains(ring, runs, rule)
    if rule == "none":
        with pytest.raises(UserError, match="'none' cannot be resumed"):
            trains(ring, runs, rule, rounds=5)
        return
    trains(ring, runs, rule, rounds=5)
    if world.rank == 0:
        trains(SoloCommunicator(), runs, rule, rounds=7)
    world.barrier()
    trains(ring, runs, rule, rounds=9)


@pytest.mark.parametrize("wire", SHORT_WIRES)
def test_every_rule_runs_with_a_short_wire(world: Communicator, runs: str, wire: str) -> None:
    comm = RingCommunicator(world, wire)
    for rule in RULES:
        if not refused_wires(rule, "ring"):
            trains(comm, runs, rule, wire=wire)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not refused_parts(rule, two_types=True)])
def test_a_model_of_two_types(ring: Communicator, rule: str) -> None:
    rounds = Rounds(ring, config("runs", "r", sync(rule)), two_types=True)
    for _ in range(3):
        rounds.round()


@pytest.mark.parametrize("backend", ["mpi", "ring"])
@pytest.mark.parametrize("rule", filter(averages_parameters, RULES))
def test_an_average_in_the_background_gives_the_same_bits(
    world: Communicator, ring: Communicator, rule: str, backend: str
) -> None:
    comm = world if backend == "mpi" else ring
    found = []
    for background in (False, True):
        rounds = Rounds(comm, config("runs", "r", sync(rule)))
        for _ in range(3):
            rounds.average(background)
        found.append(rounds.bits())
    assert found[0] == found[1]
    assert len(set(comm.allgather(found[0]))) == 1


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair))
def test_two_rules_together(ring: Communicator, runs: str, pair: tuple[str, str]) -> None:
    trains(ring, runs, *pair)
