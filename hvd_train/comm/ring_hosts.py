"""Which ranks share a host, found by probing their memory, not by name; and memory for each such group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvd_train.comm import _shm
from hvd_train.comm.base import Communicator
from hvd_train.errors import EnvironmentMismatch, RankLost


@dataclass(frozen=True)
class Hosts:
    """The ranks of each host, and this rank's place among them."""

    ranks: list[list[int]]
    """For each host its ranks, ascending; hosts in the order of their lowest rank."""

    host: int
    """The index of this rank's host."""

    local_rank: int
    """This rank's index among those of its host."""

    @property
    def local(self) -> list[int]:
        """The ranks of this host, ascending."""
        return self.ranks[self.host]

    def share(self, comm: Communicator, num_bytes: int) -> _shm.Region:
        """A region of each host, which its first rank makes and every rank maps. Collective over `comm`.

        Raises `RankLost` if the first rank died.
        """
        mine = _shm.Region.create(num_bytes) if self.local_rank == 0 else None
        addresses = comm.allgather(mine.address() if mine else b"")
        region = mine or self._open(comm, addresses[self.local[0]])
        comm.barrier()  # the first rank keeps it open until all have it
        return region

    def back(self, comm: Communicator, allocate: Callable[[], None], num_bytes: int) -> None:
        """Backs a region of `num_bytes` with memory, before any rank writes: the first touch of memory that a
        container does not have ends the process. Collective over `comm`.

        Args:
            allocate: backs this rank's part.

        Raises `MemoryError`, on every rank, if a host has not enough.
        """
        try:
            allocate()
            failed = False
        except MemoryError:
            failed = True
        short = [r for r, f in enumerate(comm.allgather(failed)) if f]
        if short:
            raise MemoryError(
                f"ranks {short} have no memory for their part of {num_bytes:,} bytes on their host: each of "
                f"its {len(self.local)} ranks needs a copy. Use fewer ranks per host, or a larger limit."
            )

    def _open(self, comm: Communicator, address: bytes) -> _shm.Region:
        try:
            return _shm.Region.open(address)
        except RuntimeError as error:
            comm.revoke()  # the others wait for this rank
            raise RankLost(
                f"{comm.where}: cannot map the memory of rank {self.local[0]}, which may have died: {error}."
            ) from None


def find_hosts(comm: Communicator) -> Hosts:
    """Groups the ranks by whether they can read a random number from a peer's memory, whatever their hosts
    are called. Collective.

    Raises `EnvironmentMismatch`, on every rank, if they cannot be grouped: a rank can map the memory of some
    ranks of a host, but not of all.
    """
    probe = _shm.Region.create(0)
    addresses = comm.allgather(probe.address())
    # The lowest rank that this one sees stands for its host.
    first = next(
        r for r, address in enumerate(addresses) if r == comm.rank or _shm.Region.is_visible(address)
    )
    firsts = comm.allgather(first)  # nor is a probe freed before all have tried
    odd = [r for r, f in enumerate(firsts) if firsts[f] != f]
    if odd:
        comm.barrier()  # raises here if that is due to a rank that died meanwhile
        near = firsts[odd[0]]
        raise EnvironmentMismatch(
            f"shared memory is not transitive: rank {odd[0]} can map the memory of rank {near}, and rank "
            f"{near} that of rank {firsts[near]}, which rank {odd[0]} cannot map. Expected that all ranks of "
            "a host can map each other's: start them in one container.",
            agreed=True,
        )
    ranks = [[r for r, f in enumerate(firsts) if f == leader] for leader in sorted(set(firsts))]
    host = sorted(set(firsts)).index(first)
    return Hosts(ranks, host, ranks[host].index(comm.rank))
