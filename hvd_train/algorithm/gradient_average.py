"""Data-parallel SGD: in every local step the ranks average their gradients. The owner of a slice steps the
optimizer on it, between reduce-scatter and all-gather of the same flat buffers that else average parameters.
Where there is an `EarlyBucket`, the reduce-scatter of one buffer begins within the backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import final

import numpy as np
from torch import Tensor

from hvd_train.algorithm.averaging import flat_sum
from hvd_train.algorithm.distances import squared_norm
from hvd_train.algorithm.early_bucket import EarlyBucket, Withdrawn
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.gradients import Gradients, copy_gradients
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
        self._early: EarlyBucket | None = None
        self._has: dict[Part, np.ndarray] = {}
        """By parameter 1 where this rank has a gradient that counts in the present step, else 0."""
        self._withdraws = False
        """Whether what this rank has given to the average that began first must not count."""
        self._present: dict[Part, list[bool]] = {}
        """By parameter whether any rank has a gradient in the present step; empty until the ranks know."""
        self._clip = 1.0
        """What the mean is multiplied by."""
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
        """Finds the memory of the gradients, once the flat state is placed. Collective."""
        self._optimizer.place()
        self._places = {p: [as_real(e.holder) for e in entries] for p, entries in self._entries.items()}
        self._on_slice = {part: partial(self._step, part) for part in self._entries}
        if self._early is not None:
            self._early.close()
            self._early = None
        early = next((part for part in self._entries if part.early), None)
        if early is not None and self._comm.averages_in_background:
            self._early = EarlyBucket(
                self._flat.buffers[early], self._comm, self._entries[early], self._on_slice[early]
            )

    def rebind(self, comm: Communicator) -> str:
        """Goes on in `comm`, to which the flat state has moved. Returns what was lost, in words.
        Collective."""
        self._comm = comm
        lost = self._optimizer.rebind(comm)
        self.place()
        return lost

    def begin_round(self) -> None:
        """Forgets what the last round showed."""
        self.finite, self.moved = True, False

    def expect(self, loss_sum: float, samples: int, divisor: int) -> None:
        """See `BeforeLast`: within the backward pass that follows an average may start. Not collective."""
        if self._early is not None:
            self._early.expect(_weight(loss_sum, samples), divisor)

    def average(self, loss_sum: float, samples: int) -> float:
        """x_(t+1) from the gradients that the parameters of all ranks have now, in live and anchor. Returns
        the seconds of it, and of what of it was within the backward pass, without those of the optimizer.
        Collective.

        The live parameters are overwritten by the gradients first; x_t is in the anchor.

        Args:
            loss_sum: of this rank's samples. If it or a gradient is not finite, this rank has no weight.
            samples: of this rank; 0: it has no gradient.
        """
        began = time.perf_counter()
        phase("average")
        self._optimizer_s, self._withdraws = 0.0, False
        self._present.clear()
        weight = _weight(loss_sum, samples)
        try:
            used = self._at_once(weight) if self._early is None else self._early_first(self._early, weight)
        except Withdrawn:
            used = self._at_once(weight)
        self.counted = used > 0
        self.finite &= self.counted or not samples
        early_s = 0.0 if self._early is None else self._early.seconds
        return early_s + time.perf_counter() - began - self._optimizer_s

    def _at_once(self, weight: float) -> float:
        """Averages one buffer after the other. Returns the weight that this rank had."""
        self._withdraws = False
        weight = self._lay(list(self._places), weight)
        for part, on_slice in self._on_slice.items():
            self.moved |= self._comm.average(self._flat.buffers[part], weight, on_slice)
        return weight

    def _early_first(self, early: EarlyBucket, weight: float) -> float:
        """The same where the average of one buffer has begun, or begins now. Raises `Withdrawn`, on every
        rank and before anything has moved, if a rank has less weight than it had when that began."""
        before = early.start(weight)
        rest = [part for part in self._places if not part.early]
        weight = self._lay(rest, before)
        self._withdraws = early.changed or weight < before
        self._has |= {part: early.has for part in self._places if part.early}
        if early.wait():
            self.moved = True
            for part in rest:
                self._comm.average(self._flat.buffers[part], weight, self._on_slice[part])
        return weight

    def _lay(self, parts: Sequence[Part], weight: float) -> float:
        """Copies the gradients of this rank to where the parameters are. Returns its weight, which is 0 if
        one is not finite."""
        if weight:
            for part in parts:
                holders = [entry.holder for entry in self._entries[part]]
                self._has[part] = copy_gradients(holders, self._places[part])
            if all(math.isfinite(flat_sum(self._flat.buffers[part].live)) for part in parts):
                return weight
        self._has |= {part: np.zeros(len(self._entries[part])) for part in parts}
        return 0.0

    def give_up(self) -> None:
        """Ends an average that has begun, after an error on this rank. Not collective."""
        if self._early is not None:
            self._early.give_up()

    def _step(self, part: Part, mean: Tensor, start: int) -> None:
        """The slice step."""
        if not self._present:
            self._agree(mean)
        if self._clip < 1:
            mean.mul_(self._clip)
        began = time.perf_counter()
        self._optimizer.step(part, mean, self._present[part])
        self._optimizer_s += time.perf_counter() - began

    def _agree(self, mean: Tensor) -> None:
        """One small allreduce in the first slice step of a step tells every owner which parameters any rank
        has a gradient of, the norm of all slices, and whether a rank withdraws: then it raises
        `Withdrawn`."""
        size, parts = self._comm.size, list(self._on_slice)
        row = np.concatenate([np.zeros(size), [self._withdraws], *(self._has[part] for part in parts)])
        if self._clip_norm:
            row[self._comm.rank] = squared_norm(mean)
        row = self._comm.allreduce(row, Op.SUM)
        if row[size]:
            raise Withdrawn
        norm = math.sqrt(math.fsum(row[:size])) + _EPSILON
        self._clip = self._clip_norm / norm if 0 < self._clip_norm < norm else 1.0
        present = iter((row[size + 1 :] > 0).tolist())
        self._present = {part: list(islice(present, len(self._has[part]))) for part in parts}


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
        try:
            loss_sum, samples = self._gradients(batches, self._average.expect)
            seconds = self._average.average(loss_sum, samples)
        except BaseException:
            self._average.give_up()
            raise
        return StepDone(loss_sum, samples, seconds) if self._average.counted else StepDone(0.0, 0, seconds)


def _weight(loss_sum: float, samples: int) -> float:
    return float(samples) if math.isfinite(loss_sum) else 0.0
