"""Averages over hosts by the ring, with every wire, and what each sent. Runs on every rank of a job: see
test_ring_wire.py. Rank 0 prints one line of JSON: by wire, what `average` returns.

Arguments: the number of elements.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import xxhash

from hvd_train.comm.base import Communicator
from hvd_train.comm.mpi import MPICommunicator
from hvd_train.comm.ring import WIRES, RingCommunicator

LARGEST = 1e-3
"""Bound of the differences that are averaged."""


def start(rank: int, numel: int) -> torch.Tensor:
    return torch.sin(torch.arange(numel, dtype=torch.float64) * 0.37 + rank).float()


def difference(rank: int, numel: int) -> torch.Tensor:
    """What a round of training might change; the same bits on every rank that asks."""
    return LARGEST * torch.cos(torch.arange(numel, dtype=torch.float64) * 0.73 - 2 * rank).float()


def sent() -> dict[str, int]:
    """Bytes that each interface of this host has sent."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    fields = {name.strip(): values.split() for name, values in (line.split(":") for line in lines)}
    return {name: int(values[8]) for name, values in fields.items()}


def together(comm: Communicator) -> None:
    comm.barrier(timeout_s=60)


def average(comm: RingCommunicator, numel: int) -> dict[str, Any]:
    """Of the second average of a buffer, by rank: its `host`, the `payload` in bytes, what `eth0` and `lo` of
    the host sent meanwhile, the largest `error` of an element, and a `digest` of the result."""
    buffer = comm.buffer(numel, torch.float32)
    buffer.live.copy_(start(comm.rank, numel))
    comm.average(buffer, 1.0)
    changes = (difference(rank, numel).double() for rank in range(comm.size))
    reference = buffer.anchor.double() + sum(changes) / comm.size
    buffer.live.add_(difference(comm.rank, numel))

    together(comm)
    payload, before = comm.payload_bytes, sent()
    together(comm)
    comm.average(buffer, 1.0)
    together(comm)
    after = sent()

    mine = {
        "host": comm.host,
        "payload": comm.payload_bytes - payload,
        "eth0": after["eth0"] - before["eth0"],
        "lo": after["lo"] - before["lo"],
        "error": float((buffer.live.double() - reference).abs().max()),
        "digest": xxhash.xxh3_64_hexdigest(buffer.live.numpy()),
    }
    return {key: [of[key] for of in comm.allgather(mine)] for key in mine}


def main() -> None:
    numel = int(sys.argv[1])
    with MPICommunicator() as inner:
        results = {wire: average(RingCommunicator(inner, wire), numel) for wire in WIRES}
        if inner.rank == 0:
            print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
