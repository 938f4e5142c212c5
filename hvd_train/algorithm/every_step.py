"""The end of a round in which gradients were averaged in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from hvd_train.algorithm.averaging import Inspection, StateAverage
from hvd_train.algorithm.gradient_average import GradientAverage
from hvd_train.comm.base import Communicator


@final
class EveryStep:
    """What is left for the end of a round where gradients are averaged in every step: the model's
    floating-point buffers."""

    def __init__(self, buffers: StateAverage, gradients: GradientAverage) -> None:
        self._buffers = buffers
        self._gradients = gradients

    def start(self) -> None:
        """x_0 := the state of rank 0. Collective."""
        self._buffers.start()
        self._gradients.place()

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """See `Average`. The ranks have the same parameters, so that there is no distance; a rank is finite
        if its losses and gradients were in every step."""
        found = self._buffers.inspect(distance=False, verify=verify)
        return replace(found, finite=found.finite and self._gradients.finite)

    def moved(self) -> float:
        """0: the ranks do not drift apart."""
        return 0.0

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """See `Average`. Returns whether the parameters have moved in this round."""
        self._buffers.average(weight, healthy, verify, rounds)
        moved = self._gradients.moved
        self._gradients.begin_round()
        return moved

    def rebind(self, comm: Communicator) -> str:
        """See `Average`."""
        return f"{self._buffers.rebind(comm)} {self._gradients.rebind(comm)}".strip()
