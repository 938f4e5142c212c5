"""torch.distributed's gloo as a peer, and the network that it takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from hvd_train.comm.agree import attempt
from hvd_train.comm.base import Communicator
from hvd_train.environment.interfaces import interfaces
from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.bench.allreduce.peers import Contestant, Peer, summing

T = TypeVar("T")

_TIMEOUT = timedelta(seconds=60)
_REACH_S = 3.0
"""Seconds for an address of rank 0 to answer."""

_INTERFACE = "GLOO_SOCKET_IFNAME"


def addresses(loopback: bool) -> list[str]:
    """The IPv4 addresses of this host: of the loopback, or of all else."""
    return [str(i.address.ip) for i in interfaces() if i.loopback == loopback]


def reachable(candidates: Sequence[str], port: int) -> tuple[str, str]:
    """The first of rank 0's addresses that answers at `port`, and the interface that leads there from this
    host. Raises `EnvironmentMismatch` if none does."""
    own = {str(i.address.ip): i.name for i in interfaces()}
    for address in candidates:
        try:
            with socket.create_connection((address, port), _REACH_S) as connection:
                return address, own[connection.getsockname()[0]]
        except (OSError, KeyError):
            continue
    raise EnvironmentMismatch(f"no address of rank 0 answers: {', '.join(candidates)} at port {port}")


def _store(address: str, port: int, comm: Communicator) -> Any:
    """The store by which the ranks connect: served by rank 0, which does not wait for the others."""
    # torch has it, but does not export it by its name.
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, comm.size, comm.rank == 0, _TIMEOUT, wait_for_workers=False
    )


class GlooPeer(Peer):
    """all_reduce in place over TCP.

    Args:
        comm: connects the ranks; on one host gloo uses the loopback.
    """

    name = "gloo"

    def __init__(self, comm: Communicator) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            raise EnvironmentMismatch("this torch was built without torch.distributed's gloo")
        self._comm = comm

    def open(self) -> None:
        comm = self._comm
        store = _store("0.0.0.0", 0, comm) if comm.rank == 0 else None
        candidates, port = comm.broadcast(
            (addresses(loopback=comm.num_hosts == 1), store.port if store else 0)
        )

        def reach() -> str:
            address, interface = reachable(candidates, port)
            os.environ.setdefault(_INTERFACE, interface)
            return address

        def join(store: Any) -> None:
            try:
                store = store or _store(address, port, comm)
                dist.init_process_group(
                    "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=_TIMEOUT
                )
            except RuntimeError as error:
                raise EnvironmentMismatch(str(error)) from error

        address = self._on_every_rank(reach)
        self._on_every_rank(lambda: join(store))
        self.library = f"torch.distributed's gloo over {os.environ[_INTERFACE]}"

    def _on_every_rank(self, action: Callable[[], T]) -> T:
        """Raises `EnvironmentMismatch`, on every rank, where `action` does on any."""
        tried = attempt(self._comm, action)
        if reason := tried.why(EnvironmentMismatch):
            raise EnvironmentMismatch(reason)
        return cast("T", tried.value)

    def close(self) -> None:
        dist.destroy_process_group()

    def contestants(self, private: Tensor) -> list[Contestant]:
        return [summing(self._comm, self.name, "all_reduce", private, lambda: dist.all_reduce(private))]
