"""torch.distributed's gloo as a peer, and the network that it takes."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hvd_train.comm.base import Communicator
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.bench.peers import Contestant, Peer, summing

_TIMEOUT = timedelta(seconds=60)
_REACH_S = 3.0
"""Seconds for an address of rank 0 to answer."""

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def addresses() -> dict[str, str]:
    """The IPv4 address of each network interface of this host, by its name; the loopback last."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("40s", name.encode()))
            try:
                fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:
                continue
            found[name] = socket.inet_ntoa(request.tobytes()[20:24])
    return dict(sorted(found.items(), key=lambda item: item[1].startswith("127.")))


def reachable(candidates: dict[str, str], port: int) -> tuple[str, str]:
    """The first of rank 0's addresses that answers at `port`, and the interface that leads there from this
    host. Raises `EnvironmentMismatch` if none does."""
    own = {address: name for name, address in addresses().items()}
    for address in candidates.values():
        try:
            with socket.create_connection((address, port), _REACH_S) as connection:
                return address, own[connection.getsockname()[0]]
        except (OSError, KeyError):
            continue
    raise EnvironmentMismatch(
        f"no address of rank 0 answers: {', '.join(candidates.values())} at port {port}"
    )


def _store(address: str, port: int, comm: Communicator) -> Any:
    """Where the ranks find each other: served by rank 0, and not waited for."""
    # torch has it, but does not export it by its name.
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, comm.size, comm.rank == 0, _TIMEOUT, wait_for_workers=False
    )


class GlooPeer(Peer):
    """all_reduce in place over TCP.

    Args:
        comm: brings the ranks together; on one host they talk over the loopback.
    """

    name = "gloo"

    def __init__(self, comm: Communicator) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise EnvironmentMismatch("this torch was built without torch.distributed's gloo")
        self._comm = comm

    def open(self) -> None:
        comm = self._comm
        store = _store("0.0.0.0", 0, comm) if comm.rank == 0 else None
        mine = {n: a for n, a in addresses().items() if a.startswith("127.") == (comm.num_hosts == 1)}
        candidates, port = comm.broadcast((mine, store.port if store else 0))
        problem = ""
        try:
            address, interface = reachable(candidates, port)
            os.environ.setdefault(_INTERFACE, interface)
        except EnvironmentMismatch as error:
            problem = str(error)
        self._agree(problem)
        try:
            store = store or _store(address, port, comm)
            dist.init_process_group(
                "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=_TIMEOUT
            )
        except RuntimeError as error:
            problem = f"{error}"
        self._agree(problem)
        self.library = f"torch.distributed's gloo over {os.environ[_INTERFACE]}"

    def _agree(self, problem: str) -> None:
        problems = self._comm.allgather(problem)
        if any(problems):
            raise EnvironmentMismatch(next(filter(None, problems)))

    def close(self) -> None:
        dist.destroy_process_group()

    def contestants(self, private: Tensor) -> list[Contestant]:
        return [summing(self._comm, self.name, "all_reduce", private, lambda: dist.all_reduce(private))]
