"""The header of a round: one small allreduce before each average, after which every rank knows what
every rank did, and ranks branch on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import NamedTuple

import numpy as np

from hvd_train.comm.base import Communicator


class StepDone(NamedTuple):
    """What one rank did in one local step."""

    loss_sum: float
    """Sum of the losses of its samples."""
    samples: int
    communication_s: float = 0.0
    """Seconds of it in which the ranks averaged their gradients."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank did in its local steps since the last average."""

    samples: int
    """Samples used."""
    loss_sum: float = 0.0
    """Sum of their losses."""
    data_s: float = 0.0
    """Seconds spent on getting batches, with their transform."""
    compute_s: float = 0.0
    """Seconds spent on forward, backward and optimizer."""
    communication_s: float = 0.0
    """Seconds in which the ranks averaged their gradients in these steps."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that were drawn and not used, by reason."""
    steps: int = 0
    """Local steps taken."""
    epoch: float = 0.0
    """Epochs of its rows that it has done in all, with the part of the current one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one rank reports. Every value is a float64; counts and half hashes are exact in it."""

    samples: float
    """Samples used since the last average."""
    loss_sum: float
    """Sum of their losses."""
    finite: float = 1.0
    """1 if every value that would be averaged is finite, else 0."""
    stop: float = 0.0
    """1 if this rank was asked to stop, by a signal or by its program, else 0."""
    observe: float = 0.0
    """1 if rank 0 asks all ranks to observe themselves after this average, else 0; see `Observer`."""
    distance: float = -1.0
    """||y_i - x_t||^2 of this rank, over what is averaged in every round; -1 if not measured."""
    change: float = -1.0
    """The same of the parameters alone."""
    moved: float = -1.0
    """||mean - x_(t-1)||^2 over the slices that this rank owns, of the mean that x_t was made of; -1 if not
    measured."""
    hash_high: float = -1.0
    hash_low: float = -1.0
    """Halves of the 64-bit hash of this rank's parameters after the last average; -1 if not taken."""
    data_s: float = 0.0
    """Seconds spent on getting batches, with their transform."""
    compute_s: float = 0.0
    """Seconds spent on forward, backward and optimizer."""
    communication_s: float = 0.0
    """Seconds that the average before this round's local steps took on this rank."""
    wait_s: float = 0.0
    """Seconds that this rank waited there for the slowest one."""
    not_finite_rows: float = 0.0
    """Rows that were left out since the last average, as they are not finite."""
    damaged_rows: float = 0.0
    """Rows that were left out since the last average, as they cannot be read."""
    alone_rows: float = 0.0
    """Rows that were left out since the last average, as no other row of their batch was left."""
    steps: float = 0.0
    """Local steps since the last average."""
    epoch: float = 0.0
    """Epochs of this rank's rows that it has done in all, with the part of the current one."""


class Header:
    """The rows of all ranks. Attributes named as the fields of `Row` are float64 arrays of shape [size]."""

    def __init__(self, table: np.ndarray) -> None:
        self.size = table.shape[0]
        self._columns = {f.name: table[:, i] for i, f in enumerate(fields(Row))}
        healthy = (self._columns["finite"] == 1) & np.isfinite(self._columns["loss_sum"])
        self.weights = np.where(healthy, self._columns["samples"], 0.0)
        """The weight of each rank's parameters: its samples, 0 for a rank that is not finite; less where
        `Outliers` does not trust a rank."""
        self.unhealthy = [int(r) for r in np.flatnonzero(~healthy)]
        """Ranks with values that are not finite."""
        self.moved = bool(self.weights.any())
        """Whether the parameters have moved to an average in this round; where gradients are averaged in
        every step they may have though each rank has the weight 0."""
        self.outliers: list[int] = []
        """Ranks whose weight `Outliers` has reduced."""
        self.outlier_words = ""
        """Why."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    @property
    def samples(self) -> int:
        """Samples of all ranks."""
        return int(self["samples"].sum())

    @property
    def period(self) -> int:
        """Local steps of this round; where the ranks took different numbers their mean, rounded."""
        return max(1, round(float(self["steps"].mean())))

    @property
    def counted(self) -> np.ndarray:
        """Which ranks' losses count: those with weight, or all if the parameters moved without any."""
        return self.weights > 0 if self.weights.any() or not self.moved else self["samples"] > 0

    @property
    def loss(self) -> float | None:
        """Mean loss over the samples of the ranks whose losses count; None if there is none."""
        total = self["samples"][self.counted].sum()
        sums = self["loss_sum"][self.counted]
        return float(sums.sum() / total) if total > 0 else None

    @property
    def diverged(self) -> bool:
        """Whether no rank is finite, and no average was."""
        return len(self.unhealthy) == self.size and not self.moved

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self["stop"].any())

    @property
    def observe(self) -> bool:
        """Whether all ranks observe themselves after this average."""
        return bool(self["observe"][0])

    @property
    def shares(self) -> np.ndarray:
        """The weights over their sum, all 0 if that is 0."""
        total = self.weights.sum()
        return self.weights / total if total > 0 else self.weights

    @property
    def measured(self) -> bool:
        """Whether the ranks measured their distance from the anchor."""
        return bool((self["distance"] >= 0).all())

    @property
    def verified(self) -> bool:
        """Whether the ranks took hashes, and measured how far the last average moved."""
        return bool((self["moved"] >= 0).all())

    def unlike(self) -> list[int]:
        """Ranks whose hash is not that of rank 0."""
        high, low = self["hash_high"], self["hash_low"]
        return [int(r) for r in np.flatnonzero((high != high[0]) | (low != low[0]))]

    def spread(self, name: str) -> tuple[float, float, float]:
        """Minimum, median and maximum over the ranks."""
        values = self[name]
        return float(values.min()), float(np.median(values)), float(values.max())


def exchange(comm: Communicator, row: Row) -> Header:
    """The rows of all ranks. Collective."""
    values: Sequence[float] = astuple(row)
    return Header(comm.gather_values(values))
