"""What an outer optimizer has kept when ranks are lost, on ranks that are threads: each has its slice alone.
See tests/faults/test_outer_state.py for ranks that are killed, and for shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.outer import Nesterov
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import slice_bounds
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import LearningRateConfig
from tests.threads import ThreadCommunicator, World, on_ranks
from tests.unit.algorithm.test_outer_step import Odd, disturb, sgd

RANKS, ROUNDS = 4, 3
RULE = Nesterov(schedule=LearningRateConfig(warmup=8))


class Training:
    """Parameters of two types, so that there are two buffers with momentum."""

    def __init__(self, comm: Communicator, saved: list[Any] | None = None) -> None:
        self.module = Odd()
        if saved is not None:
            self.module.load_state_dict(saved[0]["model"])
        self.optimizer = sgd(self.module)
        self.flat = FlatState(
            self.module, self.optimizer, comm, optimizer_state="keep", parameters_apart=True
        )
        self.step = OuterStep(self.flat, comm, RULE)
        if saved is not None:
            self.step.take([of["outer"] for of in saved])
        self.average = StateAverage(self.flat, comm, self.step)
        self.average.start()

    def round(self, comm: ThreadCommunicator, number: int) -> None:
        disturb(self.module, self.optimizer, comm.rank, number)
        self.average.average(comm.rank + 1, healthy=True)

    def state(self) -> dict[str, Any]:
        outer = self.step.state_dict()
        return {
            "model": {n: t.clone() for n, t in self.module.state_dict().items()},
            "outer": {k: v.clone() if torch.is_tensor(v) else v for k, v in outer.items()},
        }


def until(comm: ThreadCommunicator, rounds: int) -> dict[str, Any]:
    training = Training(comm)
    for number in range(rounds):
        training.round(comm, number)
    return training.state()


def survives(comm: ThreadCommunicator, fewer: World, victim: int, ahead: bool) -> Any:
    """Rank `victim` is lost in round `ROUNDS`, in the average of the second buffer; the others do two more
    rounds.

    Args:
        ahead: whether it is lost in that of the last buffer, which one of the others has completed.
    """
    training = Training(comm)
    for number in range(ROUNDS):
        training.round(comm, number)
    first = comm.rank == (victim + 1) % RANKS
    reached = 0

    def broken(owned: Tensor, staged: Tensor) -> None:
        nonlocal reached
        reached += 1
        whole(owned, staged)  # the others have all that they need of this rank
        if reached == (len(training.flat.parts) if ahead else 2) and not (ahead and first):
            raise RuntimeError("a rank is lost")

    whole, comm.all_gather = comm.all_gather, broken  # type: ignore[method-assign]
    if ahead and first:
        training.round(comm, ROUNDS)
    else:
        with pytest.raises(RuntimeError, match="lost"):
            training.round(comm, ROUNDS)
    if comm.rank == victim:
        return None
    left = ThreadCommunicator(fewer, comm.rank - (comm.rank > victim))
    lost = training.average.rebind(left)
    steps, state = training.step.steps, training.state()
    for number in range(2):
        training.round(left, number)
    return lost, steps, state, training.state()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("victim", [0, 2, RANKS - 1])
def test_momentum_is_that_of_the_surviving_ranks(victim: int, ahead: bool) -> None:
    """As if a run was resumed from what they have saved after the last average that is complete anywhere."""
    rounds = ROUNDS + ahead
    saved = on_ranks(RANKS, lambda comm: until(comm, rounds))
    left = [saved[rank] for rank in range(RANKS) if rank != victim]

    def resumed(comm: ThreadCommunicator) -> Any:
        training = Training(comm, left)
        state = training.state()
        for number in range(2):
            training.round(comm, number)
        return state, training.state()

    expected = on_ranks(RANKS - 1, resumed)
    fewer = World(RANKS - 1)
    found = [f for f in on_ranks(RANKS, lambda comm: survives(comm, fewer, victim, ahead)) if f is not None]
    flat = Training(SoloCommunicator()).flat
    numels = [flat.numel(part) for part in flat.parts if part.parameters]
    assert len(numels) == 2
    gone = sum(stop - start for start, stop in (slice_bounds(n, RANKS, victim) for n in numels))
    for (lost, steps, state, later), (at_first, at_last) in zip(found, expected, strict=True):
        assert steps == rounds
        assert lost == (
            f"momentum of the outer optimizer for {gone / sum(numels):.1%} of the parameters was on lost "
            "ranks alone: it begins again at 0."
        )
        for ours, theirs in ((state, at_first), (later, at_last)):
            for part in ("model", "outer"):
                assert ours[part].keys() == theirs[part].keys()
                for name, value in theirs[part].items():
                    same = torch.equal(ours[part][name], value) if torch.is_tensor(value) else True
                    assert same, (part, name)
            assert ours["outer"]["offsets"] == theirs["outer"]["offsets"]
            assert ours["outer"]["steps"] == theirs["outer"]["steps"]
