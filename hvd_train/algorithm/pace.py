"""When a rank has taken the local steps of a round."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import final

from hvd_train.algorithm.period.base import Seconds

_RECENT = 9
"""Local steps by whose median the next one is judged."""


@final
class Pace:
    """Counts the local steps of this rank in a round, up to its limit. Not collective."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.begin(1)

    def begin(self, limit: int | Seconds) -> None:
        """Begins a round. The time of one in seconds runs from now on."""
        self._limit = limit
        self.steps = 0
        """Local steps of this round so far."""
        self._began = self._last = time.perf_counter()

    def count(self) -> None:
        """Takes note of one local step, which began when the one before ended."""
        now = time.perf_counter()
        self._recent.append(now - self._last)
        self._last = now
        self.steps += 1

    def is_over(self) -> bool:
        """Whether the round has all of its steps on this rank: in a round in seconds at least one, and as
        many as fit."""
        if isinstance(self._limit, int):
            return self.steps >= self._limit
        return self.steps > 0 and self._last - self._began + median(self._recent) > self._limit.value
