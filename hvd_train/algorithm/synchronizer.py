"""What all ranks do together in a round: header, check of the bits, average. Done nowhere else."""

from __future__ import annotations

import time

from hvd_train.algorithm.averaging import Average, check_bits, drift, report
from hvd_train.algorithm.header import Header, Work, exchange
from hvd_train.algorithm.outliers import Outliers
from hvd_train.comm.base import Communicator
from hvd_train.liveness import phase


class Synchronizer:
    """Synchronizes the states of the ranks after their local steps.

    Args:
        average: of the model's state.
        check_every: rounds between two checks that all ranks hold the same bits; 0: never.
        measure_drift: whether the rounds that are checked measure the drift as well. That needs no further
            pass over the state, but makes the pass more expensive.
        drift_at_once: whether it is known in the round that is measured, not in the next one. That needs a
            pass over this rank's slice and one more small message in these rounds.
        outliers: reduces the weights of ranks that it does not trust. If it is on, every round measures.
        checked: what of a rank must be finite, beside its loss, in words.
    """

    def __init__(
        self,
        average: Average,
        comm: Communicator,
        *,
        check_every: int,
        measure_drift: bool = True,
        drift_at_once: bool = False,
        outliers: Outliers | None = None,
        checked: str = "parameters",
    ) -> None:
        self._average = average
        self._comm = comm
        self._check_every = check_every
        self._measure_drift = measure_drift
        self._drift_at_once = drift_at_once
        self._outliers = Outliers("off") if outliers is None else outliers
        self.checked = checked
        self._before: Header | None = None
        self.drift: float | None = None
        """Of the round before the last one, or with `drift_at_once` of the last one. None where it was not
        measured."""
        self.communication_s = 0.0
        """Seconds of the last round on this rank: checks and average. Goes into the next header; other
        communication in that round is added to it."""
        self.wait_s = 0.0
        """Seconds of the last round on this rank: the header, which waits for the slowest rank."""

    def start(self) -> None:
        """x_0 := the state of rank 0. Collective."""
        self._average.start()

    def rebind(self, comm: Communicator) -> str:
        """See `Average`."""
        self._comm, self._before = comm, None
        return self._average.rebind(comm)

    def synchronize(self, rounds: int, work: Work, stop: bool = False, observe: bool = False) -> Header:
        """x_(t+1) := sum of w_i y_i, w_i the share of rank i in the samples of the healthy ranks. Collective.

        Args:
            rounds: done before this one.
            work: of this rank since the last average.
            stop: whether this rank was asked to stop.
            observe: whether rank 0 wants an observation after this round.

        Raises `BitsDiffer` on every rank, `ViewReplaced` on one.
        """
        began = time.perf_counter()
        measure = self._outliers.is_on or (self._measure_drift and self._is_checked(rounds))
        found = self._average.inspect(distance=measure, verify=self._is_checked(rounds - 1))
        row = report(
            found,
            work,
            stop=stop,
            observe=observe,
            communication_s=self.communication_s + work.communication_s,
            wait_s=self.wait_s,
        )
        inspected = time.perf_counter()
        phase("header")
        header = exchange(self._comm, row)
        met = time.perf_counter()
        check_bits(header)
        self._outliers.judge(header)
        weight = float(header.weights[self._comm.rank])
        phase("average")
        header.moved = self._average.average(
            weight,
            self._comm.rank not in header.unhealthy,
            verify=self._is_checked(rounds),
            # All of the state of an unhealthy rank is the others' mean afterwards.
            rounds=None if header.unhealthy else rounds,
        )
        self.drift = self._known_drift(header, rounds)
        self._before = header if header.measured else None
        self.wait_s = met - inspected
        self.communication_s = time.perf_counter() - met + inspected - began
        return header

    def _known_drift(self, header: Header, rounds: int) -> float | None:
        """The newest drift, where it becomes known in this round. Collective with `drift_at_once`."""
        if not self._drift_at_once:
            before = self._before if header.verified else None
            return None if before is None else drift(before, header["moved"])
        if not self._is_checked(rounds) or not header.weights.any():
            return None
        return drift(header, self._comm.gather_values((self._average.moved(),)))

    def _is_checked(self, rounds: int) -> bool:
        """Whether the average that follows `rounds` rounds is checked, one round later."""
        return self._check_every > 0 and rounds % self._check_every == 0
