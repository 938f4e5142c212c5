"""The period follows the drift, so that this stays near a bound."""

from __future__ import annotations

import math
from typing import Annotated, Any, final

import msgspec

from hvd_train.algorithm.period.base import Done
from hvd_train.io.stateful import Count, State, checked
from hvd_train.io.text import counted


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    base: Count
    k: Annotated[int, msgspec.Meta(ge=1)]


@final
class DriftPeriod:
    """k grows while the drift is below a bound, and shrinks where it is above. With D the drift of a round of
    k local steps and B the bound:

        k := min(floor(k sqrt(B / D)), 2 k, most), at least 1

    If the ranks move apart at a constant rate, the drift grows with the square of k, and the new k is the
    largest that keeps to the bound. If they differ by noise alone it grows in proportion to k, and a few
    measurements are needed until the period settles.

    That averages are due where the ranks have moved apart is from Kamp et al., "Efficient Decentralized Deep
    Learning by Dynamic Model Averaging", arXiv:1807.03210, whose divergence is the drift. There a rank asks
    for an average when its distance from the last one passes the bound; here the next rounds become shorter,
    and no rank waits for another within a round.

    Args:
        k: the period until the first measurement.
        bound: B, in the unit of the squared parameters.
        most: the largest period.
    """

    def __init__(self, k: int, *, bound: float, most: int) -> None:
        self._base = self._k = k
        self._bound = bound
        self._most = most
        self.words = (
            f"average every {counted(k, 'local step')} at first, then as often as keeps the drift near "
            f"{bound:g}, at most every {most}"
        )

    def next(self, rounds: int, rate: float) -> int:
        """See `Period`."""
        return self._k

    def after_round(self, done: Done) -> str:
        """See `Period`. Takes the drift of this round, where it was measured."""
        if done.drift is not None:
            growth = math.sqrt(self._bound / done.drift) if done.drift > 0 else math.inf
            self._k = max(1, min(math.floor(done.k * min(growth, 2.0)), self._most))
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The period."""
        return {"base": self._base, "k": self._k}

    def load_state_dict(self, state: State) -> None:
        """Restores it; with another base it begins with that."""
        saved = checked(state, _Saved)
        self._k = min(saved.k, self._most) if saved.base == self._base else self._base
