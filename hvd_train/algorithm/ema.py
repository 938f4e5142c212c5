"""An exponential moving average of the averages x_t, of which each rank holds one slice.

With decay d the average after n rounds is the weighted mean of x_1 to x_n, in which x_s has the weight
d^(n-s) over the sum of all: it begins at x_1, without a bias towards x_0 or zero. Adam divides by 1 - d^n for
that (D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, section 3). The
recurrence

    e_n = e_(n-1) + a_n (x_n - e_(n-1)),    a_n = (1 - d) / (1 - d^n),

gives the same, and nothing is divided when the average is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from hvd_train.algorithm.averaging import PIECE_BYTES, Average, Inspection
from hvd_train.algorithm.evaluate import Evaluator
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.header import Header
from hvd_train.algorithm.optimizer_state import as_real
from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import slice_bounds
from hvd_train.io.stateful import Count, State, checked

PREFIX = "ema_"
"""What precedes the names of the metrics of a moving average."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an `Ema` as a checkpoint holds it; the values are a model's file beside it."""

    averages: Count


class Ema:
    """The moving average of the parameters and floating-point buffers that are in the flat state.

    The model's tensors come first in each buffer, and the optimizer's after them. The elements of the model
    are dealt evenly: a rank reads its slice of an anchor after an average, which needs no message. Values are
    kept in float32, in float64 for that type. Stateful: the number of averages; see `take` for the values.

    Args:
        decay: per round, from 0 to below 1; 0: there is no moving average.
    """

    def __init__(self, flat: FlatState, comm: Communicator, decay: float) -> None:
        self._flat = flat
        self._comm = comm
        self._decay = decay
        self._numels: dict[Part, int] = {}
        for entry in flat.entries if decay else ():
            if entry.kind != "moment":
                self._numels[entry.part] = max(entry.stop, self._numels.get(entry.part, 0))
        self._slices: dict[Part, Tensor] = {}
        self.averages = 0
        """Averages that it is of; the same on every rank. 0: it has no value."""

    def _bounds(self, part: Part, rank: int) -> tuple[int, int]:
        return slice_bounds(self._numels[part], self._comm.size, rank)

    @torch.no_grad()
    def after_average(self) -> None:
        """Takes the newest anchor in. Not collective."""
        if not self._decay:
            return
        self.averages += 1
        share = (1 - self._decay) / (1 - self._decay**self.averages)
        for part in self._numels:
            start, stop = self._bounds(part, self._comm.rank)
            newest = self._flat.buffers[part].anchor[start:stop]
            own = self._slices.setdefault(part, torch.zeros(stop - start, dtype=_wide(part.dtype)))
            own.lerp_(newest.to(own.dtype), share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Gives the model the moving average, and afterwards the values of the newest average, which its
        parameters must have had before, and its buffers as they were. Entering is collective: every rank
        sends its slice to all."""
        buffers = [(e.holder, e.holder.clone()) for e in self._flat.entries if e.kind == "buffer"]
        try:
            for part in self._numels:
                self._spread(part)
            yield
        finally:
            for part, numel in self._numels.items():
                buffer = self._flat.buffers[part]
                buffer.live[:numel].copy_(buffer.anchor[:numel])
            for holder, values in buffers:  # some are not averaged in every round, or were computed anew
                holder.copy_(values)

    @torch.no_grad()
    def _spread(self, part: Part) -> None:
        """live := the slices of all ranks. In pieces: what is sent is copied, and MPI counts in 31 bits."""
        live, length = self._flat.buffers[part].live, PIECE_BYTES // part.dtype.itemsize
        for rank in range(self._comm.size):
            begin, end = self._bounds(part, rank)
            for start in range(begin, end, length):
                stop = min(start + length, end)
                piece = live[start:stop]
                if rank == self._comm.rank:
                    piece.copy_(self._slices[part][start - begin : stop - begin])
                values = piece.view(torch.uint8).numpy()
                received = self._comm.broadcast(values, root=rank)
                if rank != self._comm.rank:
                    values[:] = received

    @torch.no_grad()
    def take(self) -> None:
        """Takes this rank's slice from the model, which holds a moving average that was saved. Before the
        flat state is placed; not collective."""
        for part in self._numels:
            start, stop = self._bounds(part, self._comm.rank)
            own = torch.zeros(stop - start, dtype=_wide(part.dtype))
            for entry in self._flat.entries:
                first, last = max(start, entry.start), min(stop, entry.stop)
                if entry.kind != "moment" and entry.part == part and first < last:
                    laid = torch.empty(math.prod(entry.size), dtype=part.dtype)
                    laid.as_strided(entry.size, entry.stride).copy_(as_real(entry.holder))
                    own[first - start : last - start] = laid[first - entry.start : last - entry.start]
            self._slices[part] = own

    def rebind(self, comm: Communicator) -> str:
        """Begins anew with the ranks of `comm`. Returns what is lost, in words. Not collective."""
        self._comm, self.averages = comm, 0
        self._slices.clear()
        return "the moving average begins anew: its slices of the lost ranks are gone." if self._decay else ""

    def state_dict(self) -> dict[str, Any]:
        """The number of averages."""
        return {"averages": self.averages}

    def load_state_dict(self, state: State) -> None:
        """Restores it, where the moving average is on."""
        averages = checked(state, _Saved).averages
        self.averages = averages if self._decay else 0


class AverageWithEma:
    """Averages, and takes every average into the moving average."""

    def __init__(self, inner: Average, ema: Ema) -> None:
        self._inner = inner
        self._ema = ema

    def start(self) -> None:
        """x_0, which is no average and does not count in the moving average. Collective."""
        self._inner.start()

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """See `Average`."""
        return self._inner.inspect(distance, verify)

    def moved(self) -> float:
        """See `Average`."""
        return self._inner.moved()

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """See `Average`. Without any weight there is no new anchor, and the moving average stays."""
        averaged = self._inner.average(weight, healthy, verify, rounds)
        if averaged:
            self._ema.after_average()
        return averaged

    def rebind(self, comm: Communicator) -> str:
        """See `Average`. The moving average begins anew: the slices of the lost ranks are gone."""
        return " ".join(filter(None, (self._inner.rebind(comm), self._ema.rebind(comm))))


class EmaEvaluator:
    """Evaluates the moving average beside the model: the same metrics, with `PREFIX` before their names."""

    def __init__(self, inner: Evaluator, ema: Ema) -> None:
        self._inner = inner
        self._ema = ema
        self.num_samples = inner.num_samples
        self._undefined: list[str] = []

    def after_round(self, header: Header) -> None:
        """See `Evaluator`."""
        self._inner.after_round(header)

    def try_out(self) -> list[str]:
        """See `Evaluator`."""
        names = self._inner.try_out()
        return sorted([*names, *map(named, names)])

    def evaluate(self) -> dict[str, float]:
        """The metrics of both by name. Collective."""
        figures = dict(self._inner.evaluate())
        self._undefined = list(self._inner.undefined())
        if self._ema.averages:
            with self._ema.shown():
                figures |= {named(name): value for name, value in self._inner.evaluate().items()}
            self._undefined += map(named, self._inner.undefined())
        return figures

    def undefined(self) -> list[str]:
        """See `Evaluator`."""
        return self._undefined

    def not_finite(self) -> str:
        """See `Evaluator`."""
        return self._inner.not_finite()

    def left_out(self) -> tuple[int, str]:
        """See `Evaluator`."""
        return self._inner.left_out()

    def state_dict(self) -> dict[str, Any]:
        """That of the evaluation of the model: the moving average adds nothing."""
        return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Restores it."""
        self._inner.load_state_dict(state)


def named(metric: str) -> str:
    """The name of a metric of the moving average."""
    return f"{PREFIX}{metric}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32
