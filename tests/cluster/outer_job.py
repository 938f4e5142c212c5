"""Rounds with an outer optimizer on every wire, against the same rounds in one process. Runs on every rank of
a job: see test_outer_between_hosts.py. Rank 0 prints, as JSON and by wire, what `run` returns."""

from __future__ import annotations

import json
import sys

import torch
import xxhash
from torch import nn

from hvd_train.algorithm.averager import Averager
from hvd_train.algorithm.outer import Nesterov
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import WIRES, RingCommunicator

NUMEL, ROUNDS = 10_007, 5
LARGEST = 0.1
"""Of a change in a round."""


def change(rank: int, round_: int) -> torch.Tensor:
    return LARGEST * torch.sin(torch.arange(NUMEL) * 0.37 + 3 * rank + round_)


def reference(size: int) -> torch.Tensor:
    x = nn.Parameter(torch.zeros(NUMEL, dtype=torch.float64))
    outer = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for round_ in range(ROUNDS):
        x.grad = -torch.stack([change(rank, round_).double() for rank in range(size)]).mean(0)
        outer.step()
    return x.detach()


def run(inner: MPICommunicator, wire: str) -> dict[str, object]:
    comm = RingCommunicator(inner, wire)
    model = nn.ParameterDict({"x": nn.Parameter(torch.zeros(NUMEL))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, comm, period=1, outer=Nesterov(), clip=1e6, check_every=1)
    for round_ in range(ROUNDS):
        with torch.no_grad():
            model["x"].add_(change(comm.rank, round_))
        averager.step(1)
    state = averager.state_dict()["outer"]
    pieces = comm.allgather((state["offsets"].get("x", NUMEL), len(state.get("momentum/x", ()))))
    digests = comm.allgather(xxhash.xxh3_64_intdigest(model["x"].detach().numpy()))
    return {
        "hosts": comm.num_hosts,
        "error": float((model["x"].detach() - reference(comm.size)).abs().max()),
        "digests": len(set(digests)),
        "owned": sorted(length for _, length in pieces),
    }


def main() -> None:
    with MPICommunicator() as inner:
        found = {wire: run(inner, wire) for wire in WIRES}
        if inner.rank == 0:
            json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
