"""Before the first step: what can fail on one rank fails on all, and what must be equal is compared."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from hvd_train.comm.base import Communicator
from hvd_train.errors import HvdTrainError, RanksDisagree, UserError

T = TypeVar("T")


class SetupFailed(UserError):
    """What the user gave cannot be run on some of the ranks."""

    agreed = True


class RankFailed(HvdTrainError):
    """A rank raised an exception that the user's input did not cause; the message holds its traceback."""

    agreed = True


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How an action failed on a rank."""

    kind: type[HvdTrainError]
    """`RankFailed` for an exception that is not of this package; `text` is its traceback then."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Attempt(Generic[T]):
    """What came of an action that every rank attempted. The failures are the same on all of them."""

    value: T | None
    """What the action returned on this rank; None if it failed here."""
    cause: Exception | None
    """What it raised on this rank; None if it did not."""
    failures: Sequence[Failure | None]
    """By rank; None where it did not fail."""

    @property
    def failed(self) -> list[int]:
        """The ranks on which it failed, in ascending order."""
        return [rank for rank, failure in enumerate(self.failures) if failure is not None]

    def why(self, expected: type[HvdTrainError]) -> str:
        """The message of the lowest rank that failed, after the ranks that failed alike unless all did; empty
        if none failed. Raises `RankFailed`, on every rank, if that failure is not an `expected` one."""
        if not self.failed:
            return ""
        size, first = len(self.failures), self.failed[0]
        failure = cast("Failure", self.failures[first])
        if not issubclass(failure.kind, expected):
            raise RankFailed(
                f"rank {first} of {size}: {failure.text}".replace(": \n", ":\n", 1)
            ) from self.cause
        alike = [str(rank) for rank in self.failed if self.failures[rank] == failure]
        return failure.text if len(alike) == size else f"rank {', '.join(alike)} of {size}: {failure.text}"


def attempt(comm: Communicator, action: Callable[[], T]) -> Attempt[T]:
    """Runs `action` on every rank and tells every rank the outcome on the others. Collective; `action`
    must not be. Raises nothing of what `action` raises, but for exceptions that end the process."""
    value: T | None = None
    failure: Failure | None = None
    cause: Exception | None = None
    try:
        value = action()
    except HvdTrainError as error:
        failure, cause = Failure(kind=type(error), text=str(error)), error
    except Exception as error:
        failure, cause = Failure(kind=RankFailed, text=f"\n{traceback.format_exc()}"), error
    return Attempt(value=value, cause=cause, failures=comm.allgather(failure))


def together(comm: Communicator, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; if it raises on any, every rank raises. Collective; `action` must not be.

    Raises:
        SetupFailed: with the message of the lowest rank whose `action` raised a `UserError`; the ranks are
            named unless all say the same.
        RankFailed: with the message of the lowest rank that raised another error of this package, or the
            traceback of one that raised anything else.
    """
    tried = attempt(comm, action)
    if reason := tried.why(UserError):
        raise SetupFailed(reason) from tried.cause
    return cast("T", tried.value)


def require_equal(comm: Communicator, what: str, values: Mapping[str, Any], remedy: str) -> None:
    """Compares small values by name. Collective.

    Raises `RanksDisagree`, on every rank, naming the first that differs, the ranks, both values, and where
    there are several hosts those.
    """
    hosts, everyone = zip(*comm.allgather((comm.host, dict(values))), strict=True)
    for theirs in everyone:
        for key in sorted(everyone[0].keys() | theirs.keys()):
            first, other = everyone[0].get(key), theirs.get(key)
            if first != other:
                like_other = [r for r, v in enumerate(everyone) if v.get(key) == other]
                raise RanksDisagree(
                    f"the ranks have different {what}: {key} is {first!r} on {_ranks([0], hosts)} but "
                    f"{other!r} on {_ranks(like_other, hosts)}. {remedy}"
                )


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = f"rank {', '.join(map(str, ranks))}"
    theirs = dict.fromkeys(hosts[rank] for rank in ranks)
    return f"{named} ({', '.join(theirs)})" if len(set(hosts)) > 1 else named


def decided(comm: Communicator, value: T, check: Callable[[], None]) -> T:
    """The `value` of rank 0, on every rank, if `check` finds nothing wrong there. Collective.

    Raises on every rank the `HvdTrainError` that `check` raised on rank 0.
    """
    error: HvdTrainError | None = None
    if comm.rank == 0:
        try:
            check()
        except HvdTrainError as found:
            error = found
    agreed, error = comm.broadcast((value, error))
    if error is not None:
        raise error
    return agreed
