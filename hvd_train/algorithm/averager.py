"""Averaging in your own training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.header import Header, Work
from hvd_train.algorithm.outer import OuterRule
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.algorithm.outliers import Outliers
from hvd_train.algorithm.pace import Pace
from hvd_train.algorithm.period.base import Done, Period, own_limit
from hvd_train.algorithm.period.drift import DriftPeriod
from hvd_train.algorithm.period.given import FixedPeriod
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.comm.base import Communicator
from hvd_train.config.sync import Policy
from hvd_train.config_values import require
from hvd_train.io.output import warn
from hvd_train.io.stateful import Count, State, checked


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an `Averager` on one rank."""

    rounds: Count
    period: dict[str, Any]
    outer: dict[str, Any]
    outliers: dict[str, Any]


class Averager:
    """Averages a model and its optimizer every `period` local steps, in your own training loop.

        averager = hvd_train.Averager(model, optimizer, comm, period=10)
        for inputs, targets in batches:
            ...
            optimizer.step()
            averager.step(len(inputs))
        averager.finish()

    The constructor is collective: parameters, buffers and optimizer state are laid out flat and take the
    values of rank 0. Every rank must call `step` the same number of times; a rank that is out of data calls
    `step(0)`. With `TimePeriod` ranks call it different numbers of times, and each must go on until the same
    number of `rounds` is done.

    Args:
        model: on the CPU. Its parameters keep their identity; their data moves.
        optimizer: of the model's parameters. Load its state first.
        comm: from `hvd_train.connect()`.
        period: local steps between two averages, or a schedule of them, such as
            `hvd_train.QsrPeriod(4, alpha=0.02, most=48)`. After each average the schedule of rank 0
            decides on the next k, which is broadcast. `hvd_train.TimePeriod(2.0)`: as many local steps on
            each rank as fit into 2 seconds.
        optimizer_state: `average` its floating-point state like the parameters, `keep` it on each rank, or
            `reset` it after each average. Step counters stay each rank's own.
        batch_norm: `average` floating-point buffers of the model, or `keep` them.
        moments: the same as `optimizer_state` for single moments: `{"exp_avg_sq": "keep"}`.
        every_rounds: averages between two of a moment, or of the `buffers`: `{"exp_avg": 3}`.
        check_every: averages between two checks that all ranks hold the same bits, and with `DriftPeriod`
            between two measurements of the drift; 0: never.
        outer: how the parameters move on from the mean: `SlowMo()`, `Nesterov()`, or a rule of your own.
            None: they become the mean.
        clip: clip the averaged change of the parameters to this 2-norm; 0: do not clip.
        outliers: reduces the weights of ranks that it does not trust; None: all are trusted.
        resume: what `state_dict` returned on each rank, in rank order, to go on from there with any number of
            ranks. Load the states of model and optimizer first; with `keep` or `every_rounds` those that
            this rank has saved.

    Raises `TaskError` for tensors that cannot be laid out, `RanksDisagree` if the models differ,
    `ConfigError` for `clip` with parameters of several types and for a moment that the optimizer does not
    have, and `RunDirectoryError` for a state that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        period: int | Period = 10,
        *,
        optimizer_state: Policy = "average",
        batch_norm: Literal["average", "keep"] = "average",
        moments: Mapping[str, Policy] | None = None,
        every_rounds: Mapping[str, int] | None = None,
        check_every: int = 10,
        outer: OuterRule | None = None,
        clip: float = 0.0,
        outliers: Outliers | None = None,
        resume: Sequence[State] = (),
    ) -> None:
        if isinstance(period, int) and period < 1:
            raise ValueError(f"period = {period}: expected at least 1 local step")
        if isinstance(period, DriftPeriod) and check_every < 1:
            raise ValueError(f"check_every = {check_every}: expected at least 1 with DriftPeriod")
        require(clip >= 0, "clip", clip, "0 or a positive norm")
        self._schedule = FixedPeriod(period) if isinstance(period, int) else period
        self._optimizer = optimizer
        self._comm = comm
        self._pace = Pace()
        self.rounds = 0
        """Averages done."""
        state = FlatState(
            model,
            optimizer,
            comm,
            optimizer_state=optimizer_state,
            batch_norm=batch_norm,
            moments=moments,
            every_rounds=every_rounds,
            parameters_apart=outer is not None or clip > 0,
        )
        self._outer = OuterStep(state, comm, outer, clip)
        self._outliers = Outliers("off") if outliers is None else outliers
        if resume:
            self._resume(resume, comm.rank)
        drift = isinstance(period, DriftPeriod)
        self._synchronizer = Synchronizer(
            StateAverage(state, comm, self._outer, resumed=bool(resume)),
            comm,
            check_every=check_every,
            measure_drift=drift,
            drift_at_once=drift,
            outliers=self._outliers,
        )
        self._synchronizer.start()
        self._begin()

    def _resume(self, states: Sequence[State], rank: int) -> None:
        saved = [checked(state, _Saved) for state in states]
        own = rank % len(saved)
        self.rounds = saved[own].rounds
        self._schedule.load_state_dict(saved[own].period)
        self._outer.take(state.outer for state in (saved[own], *saved[:own], *saved[own + 1 :]))
        self._outliers.load_state_dict(saved[own].outliers)

    def state_dict(self) -> dict[str, Any]:
        """What goes on beside model and optimizer, of this rank: tensors, which are views, and values that
        JSON can hold. Call it after an average, when `step` has returned True."""
        return {
            "rounds": self.rounds,
            "period": self._schedule.state_dict(),
            "outer": self._outer.state_dict(),
            "outliers": self._outliers.state_dict(),
        }

    def _begin(self) -> None:
        """Begins a round. Collective, unless the period is a number."""
        limit = self._schedule.next(self.rounds, float(self._optimizer.param_groups[0]["lr"]))
        if not isinstance(self._schedule, FixedPeriod):
            limit = self._comm.broadcast(limit)
        own = own_limit(limit, self._comm.rank)
        self.period = own if isinstance(own, int) else None
        """Local steps of the present round; None where time decides."""
        self._samples = 0
        self._loss_sum = 0.0
        self._pace.begin(own)
        self._began = time.perf_counter()

    def step(self, num_samples: int, loss: float = 0.0) -> bool:
        """Counts one local step on `num_samples` samples; averages if it is the last one of the round, and
        returns whether it did. Collective in the calls that average.

        Args:
            loss: the mean over these samples, for `AdaCommPeriod`. A rank with one that is not finite has
                weight 0.
        """
        self._pace.count()
        self._samples += num_samples
        self._loss_sum += loss * num_samples
        if not self._pace.is_over():
            return False
        self.average()
        return True

    def average(self) -> Header:
        """Averages now, each rank weighted by its samples since the last average. Collective.

        Raises `BitsDiffer` on every rank, `ViewReplaced` on one.
        """
        work = Work(
            samples=self._samples,
            loss_sum=self._loss_sum,
            compute_s=time.perf_counter() - self._began,
            steps=self._pace.steps,
        )
        header = self._synchronizer.synchronize(self.rounds, work)
        self.rounds += 1
        averaged = time.perf_counter()
        if header["steps"].any():
            self._tell(header)
        self._begin()
        self._synchronizer.communication_s += time.perf_counter() - averaged
        return header

    def _tell(self, header: Header) -> None:
        """Gives the schedule what the round showed; prints what it has to say."""
        done = Done(rounds=self.rounds, k=header.period, header=header, drift=self._synchronizer.drift)
        message = self._schedule.after_round(done)
        if message and self._comm.rank == 0:
            warn(f"round {self.rounds}: {message}")

    def finish(self) -> None:
        """Averages the local steps since the last average; does nothing if there were none. Collective."""
        # All ranks have done the same number of local steps in this round, with `TimePeriod` none, so that
        # all decide the same.
        if self._pace.steps:
            self.average()
