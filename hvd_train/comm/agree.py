"""Before the first step: what can fail on one rank fails on all, and what must be equal is compared."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hvd_train.comm.base import Communicator
from hvd_train.errors import HvdTrainError, RanksDisagree, UserError

T = TypeVar("T")


class SetupFailed(UserError):
    """What the user gave cannot be run on some of the ranks."""

    agreed = True


class RankFailed(HvdTrainError):
    """A rank raised an exception that is nobody's input; the message holds its traceback."""

    agreed = True


def together(comm: Communicator, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; if it raises on any, every rank raises. Collective; `action` must not be.

    Raises:
        SetupFailed: with the message of the lowest rank whose `action` raised a `UserError`; the ranks are
            named unless all say the same.
        RankFailed: with the message of the lowest rank that raised another error of this package, or the
            traceback of one that raised anything else.
    """
    value: T | None = None
    failure: tuple[type[HvdTrainError], str] | None = None
    cause: Exception | None = None
    try:
        value = action()
    except UserError as error:
        failure, cause = (SetupFailed, str(error)), error
    except HvdTrainError as error:
        failure, cause = (RankFailed, str(error)), error
    except Exception as error:
        failure, cause = (RankFailed, f"\n{traceback.format_exc()}"), error
    failures = comm.allgather(failure)
    failed = [r for r, f in enumerate(failures) if f is not None]
    if failed:
        raise _failure(comm, failures, failed) from cause
    return value  # type: ignore[return-value]


def _failure(
    comm: Communicator, failures: list[tuple[type[HvdTrainError], str] | None], failed: list[int]
) -> HvdTrainError:
    first = failed[0]
    kind, text = failures[first]  # type: ignore[misc]
    same = [r for r in failed if failures[r] == failures[first]]
    if kind is RankFailed:
        return RankFailed(f"rank {first} of {comm.size}: {text}".replace(": \n", ":\n", 1))
    where = "" if len(same) == comm.size else f"rank {', '.join(map(str, same))} of {comm.size}: "
    return SetupFailed(where + text)


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
