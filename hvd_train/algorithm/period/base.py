"""What every schedule of the period is: what ends each round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from hvd_train.algorithm.header import Header
from hvd_train.io.stateful import State, checked


@dataclass(frozen=True, kw_only=True)
class Done:
    """What all ranks know after a round."""

    rounds: int
    """Rounds done, this one included."""
    k: int
    """Its local steps; where ranks took different numbers their mean, rounded."""
    header: Header
    """What every rank did in it."""
    drift: float | None = None
    """The newest drift, if it became known in this round; see `Synchronizer`."""


@dataclass(frozen=True)
class Seconds:
    """A round in which every rank takes as many local steps as fit into so many seconds."""

    value: float


Limit = int | tuple[int, ...] | Seconds
"""What ends a round: a number of local steps, one for each rank, or a time."""


def own_limit(limit: Limit, rank: int) -> int | Seconds:
    """What ends the round on one rank."""
    return limit[rank] if isinstance(limit, tuple) else limit


class Period(Protocol):
    """A schedule of the period. Stateful; it decides on values that all ranks know, and never communicates.

    Ranks on unlike machines may still compute rates that differ in the last bit. Only rank 0's answer counts:
    it is broadcast with the stop flag.
    """

    @property
    def words(self) -> str:
        """The rule in words, for the run's header; empty for a period that does not change."""

    def next(self, rounds: int, rate: float) -> Limit:
        """The limit of the round that starts after `rounds` rounds; mostly k, at least 1. Called again before
        that round it gives the same.

        Args:
            rate: learning rate of the first parameter group in that round, without its warm-up.
        """

    def after_round(self, done: Done) -> str:
        """Takes what a round showed, before `next` is called for the one after it. Returns what the user
        should know: why the period changes, or cannot; mostly empty."""

    def state_dict(self) -> dict[str, Any]:
        """What the next periods depend on, besides the arguments of `next`."""

    def load_state_dict(self, state: State) -> None:
        """Raises `RunDirectoryError` for a state of another kind of period."""


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a period that has none."""


class Stateless:
    """What periods share that depend on the arguments of `next` alone."""

    def after_round(self, done: Done) -> str:
        """Nothing to report."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all that the periods depend on is in the configuration."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Raises `RunDirectoryError` for a state of another kind of period."""
        checked(state, _Nothing)
