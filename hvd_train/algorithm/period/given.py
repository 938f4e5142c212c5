"""Periods that depend on the round and the learning rate only: they have no state, and a resumed run
continues them by itself."""

from __future__ import annotations

import math
from typing import final

from hvd_train.algorithm.period.base import Done, Stateless
from hvd_train.algorithm.period.cost import EveryStepCost
from hvd_train.io.text import counted


@final
class FixedPeriod(Stateless):
    """The same k in every round. A resumed run takes the k of its configuration, not that of its past.

    Args:
        k: local steps of a round.
        averages: whether the parameters are averaged after it: with k = 1 it then says if that takes most of
            the time.
    """

    def __init__(self, k: int, *, averages: bool = True) -> None:
        self._k = k
        self._cost = EveryStepCost() if averages and k == 1 else None
        self.words = ""

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        return self._k

    def after_round(self, done: Done) -> str:
        """See `Period`."""
        return "" if self._cost is None else self._cost.after_round(done)


@final
class WarmupPeriod(Stateless):
    """Post-local SGD: 1 in the first rounds, then `k` (Lin, Stich, Patel and Jaggi, "Don't Use Large
    Mini-Batches, Use Local SGD", arXiv:1808.07217, section 3: H_(t) = 1 for t <= t', else H).

    Args:
        k: H, the period after the warm-up.
        rounds: t', the rounds with one local step each.
        gradients: whether the ranks average their gradients in these, as a training does. It only changes the
            words.
    """

    def __init__(self, k: int, *, rounds: int, gradients: bool = False) -> None:
        self._k = k
        self._rounds = rounds
        first = "first round" if rounds == 1 else f"first {rounds:,} rounds"
        then = f"every {counted(k, 'local step')}"
        self.words = f"average after every local step in the {first}, then {then}"
        if gradients:
            self.words = f"average gradients in every local step of the {first}, then parameters {then}"

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        return 1 if rounds < self._rounds else self._k


@final
class QsrPeriod(Stateless):
    """The quadratic synchronization rule (QSR): k grows as the learning rate falls (Gu, Lyu, Arora, Zhang and
    Huang, "A Quadratic Synchronization Rule for Distributed Deep Learning", arXiv:2310.14423, section 2).

        H = max(H_base, floor((alpha / eta)^2))

    As there, eta in a warm-up of the rate is the rate that it leads to.

    Args:
        k: H_base, the smallest period.
        alpha: in the unit of the learning rate. The period exceeds k from the rate alpha / sqrt(k + 1)
            down.
        most: the largest period; the rule has none, and a rate that falls to 0 needs one.
    """

    def __init__(self, k: int, *, alpha: float, most: int) -> None:
        self._k = k
        self._alpha = alpha
        self._most = most
        self.words = f"average every max({k}, floor(({alpha:g} / lr)^2)) local steps, at most {most}"

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        ratio = self._alpha / rate if rate > 0 else math.inf
        # The quotient of 0.3 and 0.1 is below 3: rounding must not make 8 of its square.
        wanted = ratio * ratio * (1 + 1e-12)
        return max(self._k, self._most if wanted >= self._most else math.floor(wanted))
