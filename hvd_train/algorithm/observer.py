"""What the ranks report about themselves now and then: memory and CPU, and how the layers move.

The update of a layer is the step of the average, x_(t+1) - x_t. Each rank takes its part of the norms from
the slices that it owns, so that the ranks exchange a few numbers per layer. As a rule of thumb, the relative
step ||x_(t+1) - x_t|| / ||x_(t+1)|| of one local step should be about 1e-3 (Stanford CS231n, "Neural Networks
Part 3: Learning and Evaluation").
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hvd_train.algorithm.distances import squared_distance, squared_norm
from hvd_train.algorithm.flat_state import Entry, FlatState
from hvd_train.comm.base import Communicator, Op
from hvd_train.environment.usage import UsageSampler
from hvd_train.liveness import phase
from hvd_train.record.reports import LayerReport, MachineReport

_LEAST_S = 2.0
_SHARE = 200
"""An observation takes at most one part in so many of the time."""


class Observer:
    """Observes the ranks and the layers, at most every two seconds and in at most 0.5 % of the time.

    Args:
        comm: of the ranks.
        state: which was averaged.
        host_of_rank: the number of each rank's host, from 0.
        layers: whether the layers are observed: not where the ranks are never averaged.
        every_step: whether the parameters move in every local step, so that the newest update is that of one.
        enabled: whether there are observations at all.
    """

    def __init__(
        self,
        comm: Communicator,
        state: FlatState,
        host_of_rank: Sequence[int],
        *,
        layers: bool = True,
        every_step: bool = False,
        enabled: bool = True,
    ) -> None:
        self._comm = comm
        self._state = state
        self._host_of_rank = np.asarray(host_of_rank)
        self._layers = _parameters(state) if layers else []
        self._every_step = every_step
        self._usage = UsageSampler()
        self.enabled = enabled
        """Whether figures of single ranks and layers are reported; may change between two rounds."""
        self._next_s = 0.0

    @property
    def layers(self) -> list[Entry]:
        """The trainable parameters, one of those that are the same memory."""
        return list(self._layers)

    def is_due(self) -> bool:
        """Whether this rank would observe after this round; what counts is rank 0's answer, which the header
        carries. Not collective."""
        return self.enabled and time.perf_counter() >= self._next_s

    def observe(self, rounds: int, period: int) -> list[MachineReport | LayerReport]:
        """The figures after the average of round `rounds`, which had `period` local steps. Collective; every
        rank returns the same."""
        began = time.perf_counter()
        phase("observation")
        reports: list[MachineReport | LayerReport] = [self._machine(rounds)]
        if self._layers:
            reports.append(self._layer_report(rounds, 1 if self._every_step else period))
        done = time.perf_counter()
        self._next_s = done + max(_LEAST_S, _SHARE * (done - began))
        return reports

    def _machine(self, rounds: int) -> MachineReport:
        usage, sent = self._usage.sample(), self._comm.payload_bytes
        rows = self._comm.gather_values(
            (
                usage.rss_bytes,
                usage.cpu,
                usage.throttled,
                usage.available_bytes,
                -1 if sent is None else sent,
            )
        )
        rss, cpu, throttled, available, sents = rows.T
        of_host = (available[self._host_of_rank == i] for i in range(self._host_of_rank.max() + 1))
        return MachineReport(
            round=rounds,
            rss_bytes=[int(value) for value in rss],
            cpu=cpu.tolist(),
            throttled=throttled.tolist(),
            available_bytes=[int(values.min()) for values in of_host],
            sent_bytes=int(sents.sum()) if (sents >= 0).all() else None,
        )

    @torch.no_grad()
    def _layer_report(self, rounds: int, period: int) -> LayerReport:
        sums = np.zeros((len(self._layers), 4))
        most = np.full((len(self._layers), 3), -math.inf)
        for i, entry in enumerate(self._layers):
            sums[i, :2] = self._squares(entry)
            gradient = _values(entry.holder.grad)
            if gradient is not None:
                norm, largest = _norm_and_peak(gradient)
                rms = norm / math.sqrt(max(1, entry.holder.numel()))
                sums[i, 2:] = rms, 1.0
                most[i] = -rms, rms, largest
        sums = self._comm.allreduce(sums, Op.SUM)
        most = self._comm.allreduce(most, Op.MAX)
        squared, moved, rms_sum, counted = sums.T
        absent = counted == 0
        mean = np.where(absent, math.nan, rms_sum / np.maximum(counted, 1))
        low, high, peak = (np.where(absent, math.nan, column) for column in (-most[:, 0], *most.T[1:]))
        return LayerReport(
            round=rounds,
            period=period,
            norm=np.sqrt(squared).tolist(),
            update=np.sqrt(moved).tolist(),
            gradient={"min": low.tolist(), "mean": mean.tolist(), "max": high.tolist()},
            gradient_peak=peak.tolist(),
        )

    def _squares(self, entry: Entry) -> tuple[float, float]:
        """This rank's part of ||x||^2 and of ||x - x_before||^2: over what it owns of the layer."""
        buffer = self._state.buffers[entry.part]
        start, stop = max(entry.start, buffer.start), min(entry.stop, buffer.stop)
        if start >= stop:
            return 0.0, 0.0
        now, before = buffer.anchor[start:stop], buffer.previous[start:stop]
        return squared_norm(now), squared_distance(now, before)


def _parameters(state: FlatState) -> list[Entry]:
    places = {(e.part, e.start): e for e in reversed(state.entries) if e.kind == "parameter"}
    return list(reversed(places.values()))


def _values(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return dense if dense.numel() else None


def _norm_and_peak(values: Tensor) -> tuple[float, float]:
    """The Euclidean norm and the largest absolute value; infinite if a value is not a number, as no order
    holds for that."""
    wide = values.dtype if values.dtype.itemsize >= 4 else torch.float32
    norm = float(torch.linalg.vector_norm(values, dtype=wide))
    least, largest = (float(value) for value in values.aminmax())  # several times faster than a norm
    return (math.inf, math.inf) if math.isnan(norm) else (norm, max(-least, largest))
