"""AdaComm: the period follows the training loss."""

from __future__ import annotations

import math
from typing import Annotated, Any, final

import msgspec

from hvd_train.algorithm.period.base import Done
from hvd_train.io.stateful import Count, State, checked
from hvd_train.io.text import counted

_SHRINK = 0.5
"""gamma of the paper."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    base: Count
    k: Annotated[int, msgspec.Meta(ge=1)]
    first_rate: float | None
    first_loss: float | None
    rate: float
    steps: Count
    samples: Count
    loss_sum: float


@final
class AdaCommPeriod:
    """k falls with the training loss: few averages at first, many at the end (Wang and Joshi, "Adaptive
    Communication Strategies to Achieve the Best Error-Runtime Trade-off in Local-Update SGD",
    arXiv:1810.08313, section 4).

        tau_l = ceil(sqrt(F(x_l) / F(x_0) * eta_0 / eta_l) tau_0)

    l counts intervals. If that is not below tau_(l-1) though the rate has not changed, tau_l = ceil(gamma
    tau_(l-1)) with gamma = 1/2: the loss no longer falls, and averages are to become more frequent. Where the
    rate has changed the formula counts, so that the period may grow when the rate falls.

    The paper's intervals are seconds of time, so that its periods depend on the machine. Here they are local
    steps, and F(x_l) is the mean training loss over the samples of the interval that ended; F(x_0) is that of
    the first round. Both are the same on every rank and in every repetition.

    Args:
        k: tau_0, the period of the first interval.
        steps: local steps of an interval. It ends with the round in which they are done.
        most: the largest period, where the learning rate falls faster than the loss.
    """

    def __init__(self, k: int, *, steps: int, most: int) -> None:
        self._base = self._k = k
        self._every = steps
        self._most = most
        self._first_rate: float | None = None
        self._first_loss: float | None = None
        self._rate = 0.0
        self._begin()
        self.words = (
            f"average every {counted(k, 'local step')} at first, then as often as the training loss asks for "
            f"(adacomm, every {steps:,} local steps), at most every {most}"
        )

    def _begin(self) -> None:
        self._steps = self._samples = 0
        self._loss_sum = 0.0

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        if self._first_rate is None:
            self._first_rate = self._rate = rate
        if self._steps >= self._every:
            self._k = self._following(rate, self._first_rate)
            self._rate = rate
            self._begin()
        return self._k

    def _following(self, rate: float, first_rate: float) -> int:
        if not self._samples or not self._first_loss or self._first_loss < 0:
            return self._k
        losses = max(0.0, self._loss_sum / self._samples) / self._first_loss
        rates = first_rate / rate if rate > 0 else math.inf
        wanted = math.sqrt(losses * rates) * self._base if losses else 0.0
        k = self._most if wanted >= self._most else max(1, math.ceil(wanted))
        return math.ceil(_SHRINK * self._k) if k >= self._k and rate == self._rate else k

    def after_round(self, done: Done) -> str:
        """See `Period`. Says so if the loss of the first round is not positive: the rule then has no value,
        and the period stays."""
        self._steps += done.k
        loss = done.header.loss
        if loss is None:
            return ""
        samples = int(done.header.weights.sum())
        self._samples += samples
        self._loss_sum += loss * samples
        if self._first_loss is not None:
            return ""
        self._first_loss = loss
        if loss > 0:
            return ""
        return (
            f"the training loss of round {done.rounds} is {loss:.4g}, and sync.schedule = 'adacomm' needs a "
            f"positive one: every round has {self._k} local steps."
        )

    def state_dict(self) -> dict[str, Any]:
        """The period, what it is compared with, and the sums of the interval so far."""
        return {
            "base": self._base,
            "k": self._k,
            "first_rate": self._first_rate,
            "first_loss": self._first_loss,
            "rate": self._rate,
            "steps": self._steps,
            "samples": self._samples,
            "loss_sum": self._loss_sum,
        }

    def load_state_dict(self, state: State) -> None:
        """Restores it; with another base the period is that, until the interval ends."""
        saved = checked(state, _Saved)
        self._k = min(saved.k, self._most) if saved.base == self._base else self._base
        self._first_rate, self._first_loss, self._rate = saved.first_rate, saved.first_loss, saved.rate
        self._steps, self._samples, self._loss_sum = saved.steps, saved.samples, saved.loss_sum
