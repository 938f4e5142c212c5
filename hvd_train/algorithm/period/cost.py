"""Whether averages after every local step are too expensive."""

from __future__ import annotations

from typing import final

import numpy as np

from hvd_train.algorithm.period.base import Done

_ROUNDS = 20
"""Rounds that are measured, after the first one of a start, which is slower."""
_MUCH = 0.5


@final
class EveryStepCost:
    """Says once, of rounds of one local step each, if communication takes more than half of the time.

    The share is that of the rank which has the smallest one: where a rank is slower than the others, they
    wait for it in any period, and it waits for none.
    """

    def __init__(self) -> None:
        self._rounds = 0
        self._communication = self._busy = np.zeros(0)
        """Seconds of each rank so far."""

    def after_round(self, done: Done) -> str:
        """See `Period`."""
        self._rounds += 1
        if self._rounds == 1 or self._rounds > 1 + _ROUNDS or done.header.size == 1:
            return ""
        header = done.header
        communication = header["communication_s"] + header["wait_s"]
        busy = header["data_s"] + header["compute_s"] + communication
        if self._busy.shape != busy.shape:  # the first time, and where a rank was lost
            self._communication, self._busy = np.zeros_like(busy), np.zeros_like(busy)
        self._communication = self._communication + communication
        self._busy = self._busy + busy
        share = float((self._communication / np.maximum(self._busy, 1e-9)).min())
        if self._rounds <= _ROUNDS or share <= _MUCH:
            return ""
        return (
            f"communication took {share:.0%} of the time in {_ROUNDS} rounds of one local step each: choose "
            "a longer period (sync.period), or the schedule auto (sync.schedule)."
        )
