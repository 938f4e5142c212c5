"""The Python datasets of this process. Each is made when its name is located, once for every run."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_train.data.deal import Span
from hvd_train.data.python.base import MadeSamples
from hvd_train.data.python.iterated import Iterated
from hvd_train.data.python.loading import load
from hvd_train.data.python.memory import limit_of

_made: dict[str, MadeSamples] = {}
_ranks: list[int] = [1, 1]


def share_with(ranks_of_host: int, ranks: int) -> None:
    """Says how many ranks share the memory of this host, and how many there are; before datasets are made."""
    _ranks[:] = ranks_of_host, ranks


def make(name: str, key: str) -> MadeSamples:
    """The dataset of this name, made anew in place of one that was made before.

    Args:
        key: of the configuration that names it, for messages.

    Raises `DataError`.
    """
    made = load(name, key, limit_of(*_ranks))
    _made[name] = made
    return made


def made_of(shard: str) -> MadeSamples | None:
    """The dataset whose name is the path of this shard; None for a file."""
    return _made.get(shard)


def clear() -> None:
    """Drops the datasets, and what they hold in memory."""
    _made.clear()


def hold(part: Sequence[Span]) -> None:
    """Reads what this rank needs of datasets without an index, in one pass over each. Not collective. Raises
    `DataError`, also where it does not fit into memory."""
    for name, made in _made.items():
        rows = [(span.start, span.stop) for span in part if span.shard == name]
        if rows and isinstance(made, Iterated):
            made.hold(rows)
