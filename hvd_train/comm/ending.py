"""How this process is going to end, where that is known before it does. Imports neither torch nor MPI."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Failing:
    """This process ends with a code other than 0, which need not be so of the other ranks."""

    code: int
    who: str
    """This process in words, such as `rank 1 of 4 (node2)`."""


_failing: Failing | None = None


def announce(failing: Failing | None) -> None:
    """Announces how this process is going to end; None: not known, or successfully."""
    global _failing
    _failing = failing


def announced() -> Failing | None:
    """What was announced last."""
    return _failing


def code_of(error: SystemExit) -> int:
    """The exit code of the process that `error` ends: 0 to 255."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1
