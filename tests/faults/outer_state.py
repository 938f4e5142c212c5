"""One rank of a job that trains with an outer optimizer, loses a rank in a slice step, and goes on: see
test_outer_state.py. Arguments: the victim, and a folder in which each survivor writes its report, RANK.json.

The same training is done over shared memory and over MPI. Each is compared, after every round, with one
process that has a copy of the model for each rank.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.comm.base import Communicator, OnSlice
from hvd_train.comm.buffer import slice_bounds
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import RingCommunicator
from hvd_train.errors import RankLost
from tests.mpi.suite_outer import CASES, COUNTS, STEPS, Reference, adam, local_steps, model

FATAL, ROUNDS = 8, 16
PARAMETERS = Part(torch.float64, parameters=True)


class Training:
    """What this rank does in one of the two trainings."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.module = model()
        self.optimizer = adam(self.module)
        self.flat = FlatState(self.module, self.optimizer, comm, parameters_apart=True)
        self.step = OuterStep(self.flat, comm, CASES["nesterov"]()["outer"])
        self.average = StateAverage(self.flat, comm, self.step)
        self.average.start()

    def round(self, number: int) -> None:
        local_steps(self.module, self.optimizer, number, self.comm.rank)
        self.average.average(COUNTS[self.comm.rank], healthy=True)

    def rebind(self, comm: Communicator) -> str:
        self.comm = comm
        for state in self.optimizer.state.values():  # not averaged, and so not what it was after that average
            state["step"].fill_(STEPS * FATAL)
        return self.average.rebind(comm)

    def die_in_slice_step(self) -> None:
        """Kills this process in its next slice step, when it has written the new momentum."""
        on_slice = self.step.on_slice

        def fatal(part: Part, measure: bool) -> OnSlice | None:
            step = on_slice(part, measure)

            def act(mean: Tensor, start: int) -> None:
                assert step is not None
                step(mean, start)
                os.kill(os.getpid(), signal.SIGKILL)

            return act

        self.step.on_slice = fatal  # type: ignore[method-assign]

    def error(self, reference: Reference) -> float:
        """The largest difference of a parameter, moment, or kept momentum on this rank."""
        whole = torch.zeros(self.flat.numel(PARAMETERS))
        for at, u in zip(self.places(), reference.u, strict=True):
            whole[at : at + u.numel()] = u.flatten()
        buffer = self.flat.buffers[PARAMETERS]
        pairs = [(buffer.state[0], whole[buffer.start : buffer.stop])]
        pairs += zip(self.module.parameters(), reference.replicas[0].parameters(), strict=True)
        for p, q in zip(self.module.parameters(), reference.replicas[0].parameters(), strict=True):
            ours, theirs = self.optimizer.state[p], reference.optimizers[0].state[q]
            pairs += [(ours[key], theirs[key]) for key in ("exp_avg", "exp_avg_sq")]
        return max(float((a - b).abs().max()) for a, b in pairs if a.numel())

    def places(self) -> list[int]:
        """Where each parameter begins in its buffer."""
        return [e.start for e in self.flat.entries if e.kind == "parameter"]


def forget(reference: Reference, training: Training, start: int, stop: int) -> None:
    """Without what was kept of the elements [start, stop) of the buffer."""
    for at, u in zip(training.places(), reference.u, strict=True):
        first, last = max(start - at, 0), min(stop - at, u.numel())
        if first < last:
            u.view(-1)[first:last] = 0


def main() -> None:
    victim, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_default_dtype(torch.float64)
    world = MPICommunicator()
    trainings = {"ring": Training(RingCommunicator(world)), "mpi": Training(world)}
    reference = Reference("nesterov", world.size)
    report: dict[str, Any] = {name: {"errors": []} for name in trainings}
    for number in range(FATAL):
        reference.run(range(number, number + 1))
        for name, training in trainings.items():
            training.round(number)
            report[name]["errors"].append(training.error(reference))

    if world.rank == victim:
        trainings["ring"].die_in_slice_step()
    with pytest.raises(RankLost):
        trainings["ring"].round(FATAL)
    survivors = world.survivors()
    reference.shrink(survivors.size)
    for name, training in trainings.items():
        comm = RingCommunicator(survivors) if name == "ring" else survivors
        report[name] |= {"lost": training.rebind(comm), "steps": training.step.steps}
        so_far = copy.deepcopy(reference)
        if name == "mpi":
            forget(so_far, training, *slice_bounds(training.flat.numel(PARAMETERS), len(COUNTS), victim))
        report[name]["errors"].append(training.error(so_far))
        for number in range(FATAL, ROUNDS):
            so_far.run(range(number, number + 1))
            training.round(number)
            report[name]["errors"].append(training.error(so_far))
    (folder / f"{survivors.rank}.json").write_text(json.dumps(report))
    survivors.close()


if __name__ == "__main__":
    main()
