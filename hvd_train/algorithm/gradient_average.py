"""Data-parallel SGD: in every local step the ranks average their gradients. The owner of a slice steps the
optimizer on it, between reduce-scatter and all-gather of the same flat buffers that else average parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from hvd_train.algorithm.averaging import Inspection, StateAverage, flat_sum
from hvd_train.algorithm.distances import squared_norm
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import StepDone
from hvd_train.algorithm.optimizer_state import as_real
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.comm.base import Communicator, OnSlice, Op
from hvd_train.errors import ConfigError
from hvd_train.liveness import phase
from hvd_train.tasks.base import Batch

_EPSILON = 1e-6
"""What torch's clip_grad_norm_ adds to the norm that it divides by."""


@final
class GradientAverage:
    """Averages the gradients of the ranks, weighted by their samples, and moves the parameters by the mean.

    Args:
        flat: has buffers of the parameters alone (`parameters_apart`).
        optimizer: of the slices that this rank owns.
        clip_norm: the largest 2-norm of the mean gradient over all parameters; 0: it is not clipped.

    Raises `ConfigError` for `clip_norm` with parameters of several types.
    """

    def __init__(
        self, flat: FlatState, comm: Communicator, optimizer: SlicedOptimizer, clip_norm: float
    ) -> None:
        self._flat = flat
        self._comm = comm
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._entries = optimizer.pieces.entries
        self._places: dict[Part, list[Tensor]] = {}
        self._on_slice: dict[Part, OnSlice] = {}
        self._has: dict[Part, np.ndarray] = {}
        """By parameter 1 where this rank has a gradient that counts in the present step, else 0."""
        self._optimizer_s = 0.0
        self.finite = True
        """Whether loss and gradients of this rank were finite in all steps of this round."""
        self.counted = False
        """Whether this rank had weight in the last step."""
        self.moved = False
        """Whether the parameters have moved in this round; the same on every rank."""
        if clip_norm and len(self._entries) > 1:
            types = " and ".join(str(part.dtype) for part in self._entries)
            raise ConfigError(
                f"optim.clip_norm = {clip_norm}: the model has parameters of {types}, whose gradients are "
                f"averaged one type after the other with {optimizer.asked.key}; expected parameters of one "
                "type, so that the norm of all is known. Set optim.clip_norm = 0."
            )

    def place(self) -> None:
        """Finds the memory of the gradients, once the flat state is placed. Not collective."""
        self._optimizer.place()
        self._places = {p: [as_real(e.holder) for e in entries] for p, entries in self._entries.items()}
        self._on_slice = {part: partial(self._step, part) for part in self._entries}

    def rebind(self, comm: Communicator) -> str:
        """Goes on in `comm`, to which the flat state has moved. Returns what was lost, in words. Not
        collective."""
        self._comm = comm
        lost = self._optimizer.rebind(comm)
        self.place()
        return lost

    def begin_round(self) -> None:
        """Forgets what the last round showed."""
        self.finite, self.moved = True, False

    def average(self, loss_sum: float, samples: int) -> float:
        """x_(t+1) from the gradients that the parameters of all ranks have now, in live and anchor. Returns
        the seconds of it without those of the optimizer. Collective.

        The live parameters are overwritten by the gradients first; x_t is in the anchor.

        Args:
            loss_sum: of this rank's samples. If it or a gradient is not finite, this rank has no weight.
            samples: of this rank; 0: it has no gradient.
        """
        began = time.perf_counter()
        phase("average")
        weight = float(samples)
        if samples and not (math.isfinite(loss_sum) and self._lay()):
            self.finite, weight = False, 0.0
        self.counted = weight > 0
        if not weight:
            self._has = {part: np.zeros(len(entries)) for part, entries in self._entries.items()}
        self._optimizer_s = 0.0
        for part, on_slice in self._on_slice.items():
            self.moved |= self._comm.average(self._flat.buffers[part], weight, on_slice)
        return time.perf_counter() - began - self._optimizer_s

    @torch.no_grad()
    def _lay(self) -> bool:
        """Copies the gradients of this rank to where the parameters are; returns whether all are finite."""
        for part, places in self._places.items():
            found = [entry.holder.grad for entry in self._entries[part]]
            self._has[part] = np.array([gradient is not None for gradient in found], dtype=float)
            filled = [place for place, gradient in zip(places, found, strict=True) if gradient is not None]
            torch._foreach_copy_(filled, [_dense(gradient) for gradient in found if gradient is not None])
            for place, gradient in zip(places, found, strict=True):
                if gradient is None:
                    place.zero_()
        return all(math.isfinite(flat_sum(self._flat.buffers[part].live)) for part in self._places)

    def _step(self, part: Part, mean: Tensor, start: int) -> None:
        """The slice step. One small allreduce tells every owner which parameters any rank has a gradient of,
        and the norm of all slices."""
        size = self._comm.size
        row = np.zeros(size + len(self._has[part]))
        row[size:] = self._has[part]
        if self._clip_norm:
            row[self._comm.rank] = squared_norm(mean)
        row = self._comm.allreduce(row, Op.SUM)
        norm = math.sqrt(math.fsum(row[:size]))
        if self._clip_norm and norm + _EPSILON > self._clip_norm:
            mean.mul_(self._clip_norm / (norm + _EPSILON))
        began = time.perf_counter()
        self._optimizer.step(part, mean, (row[size:] > 0).tolist())
        self._optimizer_s += time.perf_counter() - began


@final
class GradientStep:
    """One step of all ranks together: each rank's gradients on its own batches, then `GradientAverage`.
    Collective: a rank without batches takes part."""

    def __init__(self, gradients: Gradients, average: GradientAverage) -> None:
        self._gradients = gradients
        self._average = average

    def __call__(self, batches: Sequence[Batch]) -> StepDone:
        """One step with the gradient of the mean over the samples of all ranks. Without weight in it this
        rank has used no samples. Raises what `Gradients` raises."""
        loss_sum, samples = self._gradients(batches)
        seconds = self._average.average(loss_sum, samples)
        return StepDone(loss_sum, samples, seconds) if self._average.counted else StepDone(0.0, 0, seconds)


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


def _dense(gradient: Tensor) -> Tensor:
    return as_real(gradient.to_dense() if gradient.is_sparse else gradient)
