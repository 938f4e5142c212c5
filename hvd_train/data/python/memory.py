"""How much memory this process may hold samples in that have no index."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_train.environment import machine


@dataclass(frozen=True)
class Limit:
    """Bytes of samples."""

    of_this_rank: int
    of_all_ranks: int


def limit_of(ranks_of_host: int, ranks: int) -> Limit:
    """Half of the memory that each of so many ranks of this host can still take, as for `data.reading`."""
    mine = machine.share_of_memory(ranks_of_host) // 2
    return Limit(mine, mine * ranks)
