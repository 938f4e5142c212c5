"""Every rank takes as many local steps in a round as fit into a time."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.algorithm.period.base import Done, Seconds, Stateless
from hvd_train.io.text import counted, listed

_ROUNDS = 3
"""Rounds in a row after which a rank is reported that needs longer for one step."""
_NAMED_RANKS = 8


@final
class TimePeriod(Stateless):
    """Rounds of equal time for ranks of unequal speed: each takes as many local steps as fit into it, at
    least one. It ends its round when the next step would not fit, if that takes as long as its recent ones.

    Each rank is weighted by its samples, so that one that is twice as fast counts twice. With unequal numbers
    of steps the mean is not that of equally long paths; see Wang, Liu, Liang, Joshi and Poor, "Tackling the
    Objective Inconsistency Problem in Heterogeneous Federated Optimization", arXiv:2007.07481.

    Args:
        seconds: of the local steps of a round, the reading of their batches included; more than 0.
        most: local steps above which it says once that the average may lose accuracy; None: never.
    """

    def __init__(self, seconds: float, most: int | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds = {seconds}: expected more than 0")
        self._seconds = seconds
        self._most = most
        self._rounds = 0
        self._slow_for: npt.NDArray[np.int64] | int = 0
        """For how many rounds in a row each rank could take one step only, and needed longer for it."""
        self._slow_reported = False
        self.words = f"average after as many local steps of each rank as fit into {seconds:g} s"

    def next(self, rounds: int, rate: float) -> Seconds:
        """See `Period`."""
        return Seconds(self._seconds)

    def after_round(self, done: Done) -> str:
        """See `Period`. Says once which ranks need longer for a single local step, and once that ranks take
        very many."""
        self._rounds += 1
        if self._rounds == 1:  # the first steps of a start are slower
            return ""
        found = [*filter(None, (self._about_slow_ranks(done), self._about_long_rounds(done)))]
        return f"{'; '.join(found)}." if found else ""

    def _about_slow_ranks(self, done: Done) -> str:
        busy = done.header["data_s"] + done.header["compute_s"]
        is_slow = (done.header["steps"] == 1) & (busy > 1.5 * self._seconds)
        before = self._slow_for if np.shape(self._slow_for) == is_slow.shape else 0  # ranks may be lost
        self._slow_for = (before + is_slow) * is_slow
        slow = np.flatnonzero(self._slow_for >= _ROUNDS)
        if self._slow_reported or not len(slow):
            return ""
        self._slow_reported = True
        ranks = f"rank{'s' if len(slow) > 1 else ''} {listed([str(rank) for rank in slow], _NAMED_RANKS)}"
        return (
            f"one local step took {busy[slow].max():.3g} s on {ranks}, and sync.seconds is "
            f"{self._seconds:g}: the others wait for it. Raise sync.seconds"
        )

    def _about_long_rounds(self, done: Done) -> str:
        steps = done.header["steps"]
        if self._most is None or steps.max() <= self._most:
            return ""
        most, self._most = self._most, None
        return (
            f"rank {steps.argmax()} took {counted(int(steps.max()), 'local step')}: above {most} plain "
            "averaging tends to lose accuracy. Lower sync.seconds, or set sync.outer = 'nesterov'"
        )
