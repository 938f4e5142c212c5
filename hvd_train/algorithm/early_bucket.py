"""The gradients that are averaged while the backward pass still runs.

S. Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020,
arXiv:2006.15704, section 3.2.3: parameters are averaged in buckets, and those of the last layers, which have
their gradients first, are in the first bucket.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from hvd_train.algorithm.averaged_tensors import model_tensors
from hvd_train.algorithm.averaging import flat_sum
from hvd_train.algorithm.flat_state import Entry
from hvd_train.algorithm.gradients import copy_gradients
from hvd_train.algorithm.optimizer_state import as_real
from hvd_train.comm.base import Communicator, OnSlice, Pending
from hvd_train.comm.buffer import Buffer
from hvd_train.config import OptimConfig
from hvd_train.errors import HvdTrainError
from hvd_train.liveness import phase


class Withdrawn(Exception):
    """A slice step raises it, on every rank, to end an average that has begun and must not count."""


def early_parameters(model: nn.Module, config: OptimConfig) -> frozenset[str]:
    """Names of the parameters that the early bucket has: the fewest of the last ones that have a third of the
    bytes. None where all gradients must be averaged together: of several types, with clipping, which needs
    the norm of all before the first step, and of a single tensor. Raises `TaskError` as `model_tensors`."""
    params = [(name, p) for name, _, p in model_tensors(model, with_buffers=False)]
    num_bytes = sum(p.nbytes for _, p in params)
    if config.clip_norm or len({as_real(p).dtype for _, p in params}) > 1:
        return frozenset()
    names: set[str] = set()
    found = 0
    for name, p in reversed(params[1:]):
        if 3 * found >= num_bytes:
            break
        names.add(name)
        found += p.nbytes
    return frozenset(names) if found else frozenset()


@final
class EarlyBucket:
    """One buffer, whose average starts when the last of its parameters has its gradient. The constructor and
    every method that averages are collective, and all ranks call `start` and `wait` once in every step.

    Gradients are copied to memory beside the parameters, which the backward pass still reads. The start waits
    until all ranks have reached it, and the messages of the reduce-scatter travel from then on. Until `wait`
    has returned the communicator must not be called.

    Args:
        buffer: of `comm`, with the parameters of `entries`.
        on_slice: its slice step, which may raise `Withdrawn` on every rank.
    """

    def __init__(
        self, buffer: Buffer, comm: Communicator, entries: Sequence[Entry], on_slice: OnSlice
    ) -> None:
        self._buffer = buffer
        self._comm = comm
        self._on_slice = on_slice
        self._staged = comm.staging(buffer)
        self._params = [entry.holder for entry in entries]
        self._places = [
            self._staged.as_strided(e.size, e.stride, self._staged.storage_offset() + e.start)
            for e in entries
        ]
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._params)
        ]
        self._missing: set[int] = set()
        """The parameters that have no gradient yet in a backward pass whose hooks count; else none."""
        self._weight, self._divisor = 0.0, 1
        self._pending: Pending | None = None
        self._is_given_up = False
        self.has = np.zeros(len(self._params))
        """By parameter 1 where this rank has a gradient that counts in the present step, else 0."""
        self.seconds = 0.0
        """Of the present step's start, as far as it was within the backward pass."""
        self.changed = False
        """Whether a gradient has changed after the start, as one does that arrives in several parts."""

    def expect(self, weight: float, divisor: int) -> None:
        """The backward pass that follows is the last one of this step. Not collective.

        Args:
            weight: of this rank.
            divisor: what the gradients are to be divided by.
        """
        self._missing = set(range(len(self._params)))
        self._weight, self._divisor = weight, divisor

    def _arrived(self, number: int, _: Tensor) -> None:
        """Called by the backward pass for each parameter that has got its gradient."""
        if self._pending is not None:
            self.changed = True
        if number in self._missing:
            self._missing.remove(number)
            if not self._missing:
                began = time.perf_counter()
                phase("average")
                self._start(self._weight, self._divisor)
                phase("local step")
                self.seconds = time.perf_counter() - began

    def start(self, weight: float) -> float:
        """Starts the average of gradients that are complete, unless the backward pass has started it.

        Args:
            weight: of this rank.

        Returns the weight that this rank has in it: 0 if a gradient in it is not finite.
        """
        if self._pending is None:
            self.seconds = 0.0
            self._start(weight, 1)
        return self._weight

    @torch.no_grad()
    def _start(self, weight: float, divisor: int) -> None:
        self._missing.clear()
        self.changed = self._is_given_up = False
        self.has = np.zeros(len(self._params))
        if weight:
            self.has = copy_gradients(self._params, self._places)
            if divisor > 1:
                self._staged.div_(divisor)
            if not math.isfinite(flat_sum(self._staged)):
                weight = 0.0
        self._weight = weight
        self._pending = self._comm.start_average(self._buffer, weight, self._step, staged=True)

    def _step(self, mean: Tensor, start: int) -> None:
        if self._is_given_up:
            raise Withdrawn
        self._on_slice(mean, start)

    def wait(self) -> bool:
        """live := anchor := x_(t+1). Returns whether any rank had weight; without, both stay. Raises
        `Withdrawn` if the slice step did, and what `Communicator.average` raises."""
        pending, self._pending = self._pending, None
        assert pending is not None
        if not pending.wait():
            return False
        self._buffer.live.copy_(self._buffer.anchor)
        return True

    def give_up(self) -> None:
        """Ends what has started, after an error on this rank: nothing has changed then. Not collective: it
        waits for messages that are under way, as other ranks may."""
        self._missing.clear()
        self._is_given_up = True
        pending, self._pending = self._pending, None
        if pending is not None:
            with suppress(Withdrawn, HvdTrainError):
                pending.wait()

    def close(self) -> None:
        """Removes the hooks. Not collective."""
        self.give_up()
        for hook in self._hooks:
            hook.remove()
