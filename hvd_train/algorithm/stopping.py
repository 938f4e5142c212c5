"""The watch: it follows the error curve and decides when the run ends, and why.

Every rank gives its watch the same values, so that every rank has the curve. All ranks follow the decision of
rank 0, which is broadcast, as only one clock may decide.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from hvd_train.algorithm.header import Header
from hvd_train.config import StopConfig
from hvd_train.io.stateful import Count, State, checked


@dataclass(frozen=True)
class Verdict:
    """The decision of rank 0; `reason` is a key of `record.wording.REASONS`, empty while it continues."""

    reason: str = ""

    @property
    def stop(self) -> bool:
        """Whether the run ends."""
        return self.reason != ""


GO_ON = Verdict()


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """A watch's state as a checkpoint holds it."""

    curve: list[tuple[Count, float]]
    best: float | None
    best_round: Count
    since_best: Count


class Watch:
    """Decides on the error curve. Not collective; Stateful.

    Args:
        rules: which rules are on.
        mode: whether smaller (`min`) or larger (`max`) values of the watched metric are better.
    """

    def __init__(self, rules: StopConfig, mode: Literal["min", "max"] = "min") -> None:
        self._rules = rules
        self._sign = 1.0 if mode == "min" else -1.0
        self.curve: list[tuple[int, float]] = []
        """(round, value of the metric) of every evaluation so far."""
        self.best: float | None = None
        """Best value of the metric; None before the first evaluation."""
        self.best_round = 0
        self._since_best = 0

    @property
    def last(self) -> float | None:
        """The newest value of the metric."""
        return self.curve[-1][1] if self.curve else None

    def after_round(self, header: Header, rounds: int, epochs: int, seconds: float) -> Verdict:
        """Decision by the limits after `rounds` rounds, `epochs` full epochs and `seconds` of training."""
        if header.diverged:
            return Verdict("diverged")
        if header.stop:
            return Verdict("interrupted")
        limits = (
            ("max_rounds", rounds, self._rules.max_rounds),
            ("max_epochs", epochs, self._rules.max_epochs),
            ("max_seconds", seconds, self._rules.max_seconds),
        )
        for reason, seen, limit in limits:
            if limit is not None and seen >= limit:
                return Verdict(reason)
        return GO_ON

    def after_evaluation(self, rounds: int, value: float) -> Verdict:
        """Adds a value of the metric, measured after `rounds` rounds; returns the decision on it."""
        self.curve.append((rounds, value))
        if not math.isfinite(value):
            return Verdict("diverged")
        if self.best is None or self._sign * (self.best - value) > self._rules.min_delta:
            self.best, self.best_round, self._since_best = value, rounds, 0
        else:
            self._since_best += 1
        target, factor = self._rules.target_error, self._rules.divergence
        if target is not None and self._sign * (value - target) <= 0:
            return Verdict("target_error")
        if factor is not None and value > factor * self.best > 0:
            return Verdict("diverged")
        if self._rules.patience and self._since_best >= self._rules.patience:
            return Verdict("patience")
        return GO_ON

    def improved_at(self, rounds: int) -> bool:
        """Whether the best value so far is the one measured after `rounds` rounds."""
        return self.best is not None and self.best_round == rounds

    def state_dict(self) -> dict[str, Any]:
        """The curve and its best point."""
        return {
            "curve": [list(point) for point in self.curve],
            "best": self.best,
            "best_round": self.best_round,
            "since_best": self._since_best,
        }

    def load_state_dict(self, state: State) -> None:
        """Restores the curve. The patience of a run that had ended by it is counted from 0: it was resumed to
        continue."""
        saved = checked(state, _Saved)
        self.curve = saved.curve
        self.best, self.best_round = saved.best, saved.best_round
        ended = bool(self._rules.patience) and saved.since_best >= self._rules.patience
        self._since_best = 0 if ended else saved.since_best

    def best_of(self, rounds: Container[int]) -> int | None:
        """Which of some rounds had the best value; None if none of them was evaluated."""
        points = [(r, v) for r, v in self.curve if r in rounds and math.isfinite(v)]
        return min(points, key=lambda point: self._sign * point[1])[0] if points else None

    def take_best(self, rounds: int | None) -> None:
        """Makes the value after `rounds` rounds the best, as the model of a better one is lost. With None
        the next evaluation is the best."""
        self.best, self.best_round = None, 0
        if rounds is not None:
            self.best, self.best_round = dict(self.curve)[rounds], rounds
