"""What the machine allows: the traffic of an average by plain loads and stores, and the wire at its rate."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_train.comm.base import Communicator
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.bench.allreduce.peers import Contestant, Peer, meet

WIRE_SHARES = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5, "int8": 0.25 + 4 / 1024}
"""Bytes on the wire for one of float32; int8 has a scale of 4 bytes for 256 elements."""


def wire_seconds(num_bytes: int, num_hosts: int, wire: str, bits_per_s: float) -> float:
    """What a ring between hosts needs at least: each sends and receives 2 (h-1)/h of the buffer."""
    payload = 2 * (num_hosts - 1) / num_hosts * num_bytes * WIRE_SHARES[wire]
    return 8 * payload / bits_per_s


class MemoryLimit(Peer):
    """p reads, p writes in place and one stream of every element, divided among the p ranks of a host. Then
    all ranks meet: before that no average is complete.

    Args:
        comm: connects the ranks.
    """

    name = "limit"
    library = "plain loads and stores"

    def __init__(self, comm: Communicator) -> None:
        try:
            from hvd_train.comm import _shm, ring_hosts
        except ImportError as error:
            raise EnvironmentMismatch(f"the extension for shared memory is not built ({error})") from None
        self._comm = comm
        self._shm = _shm
        self._find_hosts = ring_hosts.find_hosts

    def open(self) -> None:
        self._hosts = self._find_hosts(self._comm)

    def contestants(self, private: Tensor) -> list[Contestant]:
        hosts, numel = self._hosts, private.numel()
        region = hosts.share(self._comm, self._shm.Limit.num_bytes(len(hosts.local), numel))
        limit = self._shm.Limit(region, hosts.local_rank, len(hosts.local), numel)
        limit.allocate()
        region.seal()
        live, shared = (torch.from_numpy(a).view(torch.float32) for a in (limit.live(), limit.shared()))

        def call() -> None:
            limit.run()
            meet(self._comm)

        return [
            Contestant(
                backend=self.name,
                setting="memory",
                live=live,
                call=call,
                outputs=(lambda: live, lambda: shared),
                mean=False,
                ranks=hosts.local,
            )
        ]
