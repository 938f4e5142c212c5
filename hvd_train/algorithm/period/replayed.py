"""The local steps of another run, repeated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import final

from hvd_train.algorithm.period.base import Done, Stateless
from hvd_train.io.text import spread


@final
class ReplayedPeriods(Stateless):
    """The local steps of each round of another run. Where its rounds end the last ones stay.

    Args:
        run: its folder, for messages.
        stretches: (last round, k) of stretches of rounds with one k, from round 1 on, without a gap; in place
            of k the local steps of each rank, where they differ.
        instead_of: the schedule that this replaces; empty for none.
    """

    def __init__(
        self, run: str, stretches: Sequence[tuple[int, int | tuple[int, ...]]], instead_of: str = ""
    ) -> None:
        self._run = run
        self._ends = [last for last, _ in stretches]
        self._periods = [k for _, k in stretches]
        ignored = f", in place of sync.schedule = {instead_of!r}" if instead_of else ""
        self.words = f"average when {run} did{ignored}"

    def next(self, rounds: int, rate: float) -> int | tuple[int, ...]:
        """See `Period`."""
        return self._periods[min(bisect_left(self._ends, rounds + 1), len(self._ends) - 1)]

    def after_round(self, done: Done) -> str:
        """See `Period`. Says so after the first round that the other run did not have."""
        if done.rounds != self._ends[-1] + 1:
            return ""
        k = self._periods[-1]
        steps = spread(k) if isinstance(k, tuple) else k
        last = f"{self._run} ends with round {self._ends[-1]}"
        return f"{last}: this one and those after it have as many local steps, {steps}."
