"""How many rounds, samples and epochs a run has done; the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from hvd_train.algorithm.header import Header
from hvd_train.config import EvaluateConfig
from hvd_train.io.stateful import Count, State, checked


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state as a checkpoint holds it."""

    rounds: Count
    samples: Count
    looked_at_epoch: Count
    epoch: float | None = None
    """None: that of each rank's position in its rows."""


@dataclass(kw_only=True)
class Progress:
    """Counts rounds, samples and epochs over all starts of a run. Stateful."""

    rows: Sequence[int] = ()
    """Of each rank's part, where every rank passes epochs of its own; empty: they pass them together."""

    rounds: int = 0
    """Rounds done."""

    samples: int = 0
    """Samples that all ranks have used together."""

    looked_at_epoch: int = 0
    """Full epochs at the last evaluation."""

    epoch: float = 0.0
    """Passes over all rows. With epochs of their own: the mean of the ranks, each weighted by its rows."""

    passes: list[float] = field(default_factory=list)
    """How often the rows of each rank have counted, where every rank passes epochs of its own; known after a
    round."""

    @property
    def epochs(self) -> int:
        """Full passes over all rows."""
        return math.floor(self.epoch)

    def after_round(self, header: Header) -> None:
        """Counts a round."""
        self.rounds += 1
        self.samples += header.samples
        if not self.rows:
            self.epoch = float(header["epoch"][0])
            return
        self.passes = header["epoch"].tolist()
        self.epoch = float(np.average(header["epoch"], weights=self.rows))

    def evaluation_is_due(self, config: EvaluateConfig) -> bool:
        """Whether to evaluate after this round: after every `every_rounds` rounds from the start of the run,
        and in the round that completes another `every_epochs` epochs."""
        by_rounds = config.every_rounds > 0 and self.rounds % config.every_rounds == 0
        every = config.every_epochs
        return by_rounds or (every > 0 and self.epochs // every > self.looked_at_epoch // every)

    def evaluated(self) -> None:
        """Notes an evaluation now."""
        self.looked_at_epoch = self.epochs

    def state_dict(self) -> dict[str, Any]:
        """The counts. The epoch only where the ranks have epochs of their own: else every rank's position in
        its rows gives it."""
        counts = {"rounds": self.rounds, "samples": self.samples, "looked_at_epoch": self.looked_at_epoch}
        return {**counts, "epoch": self.epoch} if self.rows else counts

    def load_state_dict(self, state: State) -> None:
        """Restores them."""
        saved = checked(state, _Saved)
        self.rounds, self.samples = saved.rounds, saved.samples
        self.looked_at_epoch = saved.looked_at_epoch
        if saved.epoch is not None:
            self.epoch = saved.epoch
