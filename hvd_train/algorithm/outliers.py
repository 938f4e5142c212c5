"""Which ranks to trust less: those whose change in a round is far larger than the changes so far.

J. Cheng et al., "EDiT: A Local-SGD-Based Efficient Distributed Training Method for Large Language Models",
ICLR 2025, arXiv:2412.07210: anomaly elimination and weighted averaging. There each rank has averages of its
own norms, of each layer, and both are applied together; here all ranks share one, which therefore holds for
any number of ranks.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np

from hvd_train.algorithm.header import Header
from hvd_train.config_values import require
from hvd_train.io.stateful import Count, State, checked


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of `Outliers`."""

    rounds: Count
    mean: float
    variance: float


class Outliers:
    """Weighs the ranks by the 2-norms g_i of the change of their parameters, ||y_i - x_t||.

    A rank is an outlier if g_i > mean + threshold * sqrt(variance), of the exponential averages over the
    rounds before. If more than half of the ranks are, the training has changed and none is an outlier. The
    averages take in the norms of the other ranks. Every rank computes the same, from the header. Stateful.

    Args:
        mode: `off`: every rank is trusted, and nothing is kept. `drop`: an outlier has the weight 0.
            `weigh`: every weight is multiplied by exp(-g_i), so that with equal samples they are softmax(-g);
            outliers are only reported.
        threshold: in standard deviations.
        decay: per round, of the exponential averages.
        warmup: rounds that only take in norms.

    Raises `ConfigError` for values out of range.
    """

    def __init__(
        self,
        mode: Literal["off", "drop", "weigh"] = "drop",
        *,
        threshold: float = 3.0,
        decay: float = 0.98,
        warmup: int = 10,
    ) -> None:
        require(mode in ("off", "drop", "weigh"), "outliers", mode, "'off', 'drop' or 'weigh'")
        require(threshold > 0, "outlier_threshold", threshold, "a positive number of standard deviations")
        require(0 <= decay < 1, "outlier_decay", decay, "a decay in [0, 1)")
        require(warmup >= 1, "outlier_warmup", warmup, "at least 1 round")
        self._mode = mode
        self._threshold = threshold
        self._decay = decay
        self._warmup = warmup
        self._rounds = 0
        self._mean = 0.0
        self._variance = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the ranks must measure their change in every round."""
        return self._mode != "off"

    def judge(self, header: Header) -> None:
        """Changes the weights of a header in which the ranks have measured their change, and names the
        outliers there; without a measurement it does nothing. Not collective."""
        counted = header.weights > 0
        if not self.is_on or not counted.any() or (header["change"] < 0).any():
            return
        norms = np.sqrt(np.where(counted, header["change"], 0.0))
        limit = self._mean + self._threshold * math.sqrt(self._variance)
        far = counted & (norms > limit) & (self._rounds >= self._warmup)
        if 2 * far.sum() > counted.sum():
            far[:] = False
        if far.any():
            header.outliers = [int(r) for r in np.flatnonzero(far)]
            header.outlier_words = self._words(header.outliers, norms)
        self._take(norms[counted & ~far])
        if self._mode == "drop":
            header.weights = np.where(far, 0.0, header.weights)
        else:
            # Less the smallest: what is common to all cancels, and cannot underflow.
            header.weights = header.weights * np.where(counted, np.exp(norms[counted].min() - norms), 0.0)

    def _take(self, norms: np.ndarray) -> None:
        """Without a bias towards 0: see `Ema`."""
        self._rounds += 1
        share = (1 - self._decay) / (1 - self._decay**self._rounds)
        self._mean += share * (float(norms.mean()) - self._mean)
        self._variance += share * (float(np.square(norms - self._mean).mean()) - self._variance)

    def _words(self, ranks: list[int], norms: np.ndarray) -> str:
        sizes = ", ".join(f"{norms[r]:.4g}" for r in ranks)
        outcome = "Left out of the average." if self._mode == "drop" else "Weighted down in the average."
        return (
            f"the parameters of ranks {ranks} changed by {sizes} (2-norm), more than {self._threshold:g} "
            f"standard deviations ({math.sqrt(self._variance):.4g}) above the average of all ranks so far "
            f"({self._mean:.4g}). {outcome}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Rounds, mean and variance."""
        return {"rounds": self._rounds, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: State) -> None:
        """Restores them, where outliers are looked for."""
        saved = checked(state, _Saved)
        if not self.is_on:
            return
        self._rounds, self._mean, self._variance = saved.rounds, saved.mean, saved.variance
