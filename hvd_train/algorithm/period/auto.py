"""The period follows the measured time of communication."""

from __future__ import annotations

import math
from statistics import median
from typing import Annotated, Any, final

import msgspec
import numpy as np

from hvd_train.algorithm.period.base import Done
from hvd_train.io.stateful import Count, State, checked
from hvd_train.io.text import counted

_ROUNDS, _MOST_ROUNDS = 10, 40
"""Rounds over which the medians are taken, at first and where the period hardly changes any more."""
_SLACK = 0.05
"""The part by which the best k may differ from the present one before the period changes. As the derivative
of c / (c + k s) by log k is at most 1/4, the share is then at most 1.25 points from the target."""
_SMALL = 0.25
"""A change of the period by a smaller part is put down to noise: more rounds are then measured."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    base: Count
    k: Annotated[int, msgspec.Meta(ge=1)]


@final
class AutoPeriod:
    """The smallest k with which communication takes at most `share` of the time. With c the seconds of
    communication in a round and s those of a local step, c / (c + k s) <= share for

        k = ceil(c (1 - share) / (share s))

    c is the median over the ranks of the seconds that the average takes, and what the slowest rank waits in
    the header: the time of its message. Waiting for a slower rank is part of s, as a larger k would not make
    it less. Both are medians over some rounds; the first round after a start or a change is left out. The
    period stays where the best k differs from it by little, and the less it changes the more rounds are
    measured, so that it settles.

    Args:
        k: the period until the first measurement.
        share: of the time, between 0 and 1.
        most: the largest period.
    """

    def __init__(self, k: int, *, share: float, most: int) -> None:
        self._base = self._k = k
        self._share = share
        self._most = most
        self._missed = False
        self._rounds = _ROUNDS
        self._begin()
        self.words = (
            f"average every {counted(k, 'local step')} at first, then as rarely as keeps communication at "
            f"{100 * share:g}% of the time, at most every {most}"
        )

    def _begin(self) -> None:
        self._skip = 1
        self._communication: list[float] = []
        self._step: list[float] = []

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        return self._k

    def after_round(self, done: Done) -> str:
        """See `Period`. Says so when the period changes, and once where the largest does not reach the
        share."""
        if self._skip:
            self._skip -= 1
            return ""
        header = done.header
        communication = float(np.median(header["communication_s"]) + header["wait_s"].min())
        busy = header["data_s"] + header["compute_s"] + header["communication_s"] + header["wait_s"]
        self._communication.append(communication)
        self._step.append((float(np.median(busy)) - communication) / done.k)
        if len(self._step) < self._rounds:
            return ""
        communication, step = median(self._communication), median(self._step)
        self._communication, self._step = [], []
        return self._decide(done.rounds, communication, step) if step > 0 else ""

    def _decide(self, rounds: int, communication: float, step: float) -> str:
        best = communication * (1 - self._share) / (self._share * step)
        fits = self._k - 1 - _SLACK * self._k < best <= self._k * (1 + _SLACK)
        k = self._k if fits else max(1, min(math.ceil(best), self._most))
        small = abs(k - self._k) < _SMALL * self._k
        self._rounds = min(2 * self._rounds, _MOST_ROUNDS) if small else _ROUNDS
        missed, self._missed = self._missed, k == self._most and best > self._most * (1 + _SLACK)
        lines = []
        if k != self._k:
            before = communication / (communication + self._k * step)
            lines.append(
                f"communication took {before:.1%} of the time with {counted(self._k, 'local step')}, and "
                f"sync.target_share is {self._share:g}: every round has {k} from round {rounds + 1} on"
            )
            self._k = k
            self._begin()
        if self._missed and not missed:
            lines.append(
                f"with sync.max_period = {k} communication takes about "
                f"{communication / (communication + k * step):.1%} of the time, more than "
                f"sync.target_share = {self._share:g}. Raise sync.max_period, or send less (sync.wire)"
            )
        return f"{'; '.join(lines)}." if lines else ""

    def state_dict(self) -> dict[str, Any]:
        """The period. What was measured is not in it: a resumed run may have another network."""
        return {"base": self._base, "k": self._k}

    def load_state_dict(self, state: State) -> None:
        """Restores it; with another base it begins with that."""
        saved = checked(state, _Saved)
        self._k = min(saved.k, self._most) if saved.base == self._base else self._base
