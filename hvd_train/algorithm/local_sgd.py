"""The algorithm: k local steps on every rank, a header, a weighted average, a look at the error.

Local SGD with periodic parameter averaging (Stich, "Local SGD Converges Fast and Communicates Little",
ICLR 2019; McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017), each rank weighted by the samples that it used.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from hvd_train.algorithm.averaging import Average, check_bits, drift, report
from hvd_train.algorithm.evaluate import Evaluator
from hvd_train.algorithm.header import Header, exchange
from hvd_train.algorithm.period import FixedPeriod
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.schedule import LearningRate
from hvd_train.algorithm.stopping import GO_ON, Verdict, Watch
from hvd_train.algorithm.worker import Work, Worker
from hvd_train.comm.agree import decided
from hvd_train.comm.base import Communicator
from hvd_train.config import EvaluateConfig
from hvd_train.errors import ConfigError
from hvd_train.liveness import phase
from hvd_train.record.reports import EvaluationReport, FaultReport, Recorder, RoundReport, Spread, StopReport
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.claim import Ownership
from hvd_train.run.signals import StopRequest

_NO_SUCH_ROW = (
    ", though every row was. Lower optim.lr, set optim.clip_norm, or bring large inputs and targets to about "
    "1."
)


@dataclass(kw_only=True)
class Clock:
    """Seconds of this rank, by `time.perf_counter`."""

    start: float = field(default_factory=time.perf_counter)
    communication_s: float = 0.0
    """Of the last average: checks, average, stop flag."""
    wait_s: float = 0.0
    """Of the last average: the header, which waits for the slowest rank."""

    def elapsed_s(self) -> float:
        """Since the training began."""
        return time.perf_counter() - self.start


@dataclass(kw_only=True)
class LocalSGD:
    """One training, ready to run: every part is made, and restored where a run goes on."""

    comm: Communicator
    worker: Worker
    average: Average
    period: FixedPeriod
    learning_rate: LearningRate
    evaluator: Evaluator
    watch: Watch
    checkpoints: Checkpoints
    claim: Ownership
    recorder: Recorder
    stop_request: StopRequest
    progress: Progress
    evaluate: EvaluateConfig
    check_every: int
    _before: Header | None = field(default=None, init=False)
    """The header of the previous round, if distances were measured in it."""
    _sick: frozenset[int] = field(default=frozenset(), init=False)
    """Ranks that were not finite in the previous round."""
    _figures_reported: bool = field(default=False, init=False)

    def run(self) -> StopReport:
        """Trains until the stop flag. Collective; every rank returns the same but for `seconds`."""
        self.average.start()  # x_0 := the state of rank 0
        clock, began_with, verdict = Clock(), self.progress.samples, GO_ON
        while not verdict.stop:
            self.learning_rate.apply(self.progress.rounds, self.progress.samples)
            period = self.period.next()
            work = self.worker.run(period)  # k local steps on this rank's own shards
            header = self._average(work, clock)
            self._count(header, period)
            verdict = self._decide(header, clock)
            looked = self._is_worth_a_look(verdict)
            if looked:
                verdict = self._look(verdict)
            improved = self.watch.improved_at(self.progress.rounds)
            self.checkpoints.after_round(self.progress.rounds, verdict.reason, improved, looked)
        return self._finish(verdict, self.progress.samples - began_with, clock)

    def _average(self, work: Work, clock: Clock) -> Header:
        """Header and average of a round: x_(t+1) := sum of w_i y_i, w_i the share of samples of rank i."""
        began = time.perf_counter()
        rounds, every = self.progress.rounds, self.check_every
        found = self.average.inspect(
            distance=every > 0 and rounds % every == 0, verify=every > 0 and (rounds - 1) % every == 0
        )
        row = report(
            found,
            samples=work.samples,
            loss_sum=work.loss_sum,
            stop=float(self.stop_request.asked),
            data_s=work.data_s,
            compute_s=work.compute_s,
            communication_s=clock.communication_s,
            wait_s=clock.wait_s,
        )
        inspected = time.perf_counter()
        phase("header")
        header = exchange(self.comm, row)
        met = time.perf_counter()
        check_bits(header)
        weight, healthy = float(header.weights[self.comm.rank]), self.comm.rank not in header.sick
        phase("average")
        self.average.average(weight, healthy, verify=every > 0 and rounds % every == 0)
        clock.wait_s = met - inspected
        clock.communication_s = time.perf_counter() - met + inspected - began
        return header

    def _count(self, header: Header, period: int) -> None:
        self.progress.rounds += 1
        self.progress.samples += header.samples
        self.evaluator.after_round(header)
        loss = header.loss
        phases = ("data", "compute", "communication", "wait")
        self.recorder.report(
            RoundReport(
                round=self.progress.rounds,
                epoch=self.worker.progress,
                samples=header.samples,
                loss=float("nan") if loss is None else loss,
                seconds={phase: Spread(*header.spread(f"{phase}_s")) for phase in phases},
                period=period,
                lr=self.learning_rate.current,
                drift=drift(self._before, header) if self._before is not None and header.verified else None,
                zero_weight=tuple(int(r) for r in (header.weights == 0).nonzero()[0]),
            )
        )
        self._before = header if header.measured else None
        if header.sick:
            self._report_sick(header)
        self._sick = frozenset(header.sick)

    def _report_sick(self, header: Header) -> None:
        everywhere = len(header.sick) == header.size
        # A rank that keeps its values stays not finite: its rows are read again in the first of these rounds.
        fresh = frozenset(header.sick) - self._sick
        where = ", as in the round before."
        if fresh:
            found = self._places(self.worker.not_finite() if self.comm.rank in fresh else "")
            where = f": {found}." if found else _NO_SUCH_ROW
        outcome = (
            "All ranks keep the last good parameters; the run ends."
            if everywhere
            else "They took the others' mean."
        )
        self.recorder.report(
            FaultReport(
                round=self.progress.rounds,
                kind="not_finite",
                ranks=tuple(header.sick),
                message=f"parameters or loss of ranks {header.sick} were not finite{where} {outcome}",
            )
        )

    def _report_figures(self, figures: dict[str, float]) -> None:
        """Once: which rows make the figures of the validation data not finite. Collective."""
        names = [name for name, value in figures.items() if not math.isfinite(value)]
        if not names or self._figures_reported or not self.evaluator.num_samples:
            return
        self._figures_reported = True
        found = self._places(self.evaluator.not_finite())
        where = f". {found}." if found else _NO_SUCH_ROW
        message = f"not finite on the validation data: {', '.join(names)}{where}"
        self.recorder.report(
            FaultReport(round=self.progress.rounds, kind="not_finite", ranks=(), message=message)
        )

    def _places(self, mine: str) -> str:
        """The places that ranks found, each once. Collective."""
        return "; ".join(dict.fromkeys(place for place in self.comm.allgather(mine) if place))

    def _decide(self, header: Header, clock: Clock) -> Verdict:
        verdict = self.watch.after_round(header, self.progress.rounds, self.worker.epochs, clock.elapsed_s())
        began = time.perf_counter()
        phase("stop flag")
        verdict = decided(self.comm, verdict, self.claim.look)
        clock.communication_s += time.perf_counter() - began
        return verdict

    def _is_worth_a_look(self, verdict: Verdict) -> bool:
        """Whether to evaluate now: where it is due, and at the end; but not where the time is short, nor the
        untrained model that is left where the first round diverged."""
        if verdict.stop:
            untrained = verdict.reason == "diverged" and self.progress.rounds == 1
            return verdict.reason != "interrupted" and not untrained
        return self.progress.look_is_due(self.evaluate, self.worker.epochs)

    def _look(self, verdict: Verdict) -> Verdict:
        """Evaluates, and says whether the error ends the run; a reason that it already has stays, unless the
        error says that the training diverged."""
        began = time.perf_counter()
        phase("evaluation")
        figures = self.evaluator.evaluate()
        self.progress.looked(self.worker.epochs)
        self._report_figures(figures)
        if self.evaluate.metric not in figures:
            self.checkpoints.save(self.progress.rounds, "every", best=False)
            raise _nothing_counted(self.evaluate.metric, saved=not self.checkpoints.failure)
        value = figures[self.evaluate.metric]
        seen = self.watch.after_evaluation(self.progress.rounds, value)
        seen = decided(self.comm, seen, self.claim.check)
        self.recorder.report(
            EvaluationReport(
                round=self.progress.rounds,
                epoch=self.worker.progress,
                samples=self.progress.samples,
                error=value,
                metrics=figures,
                best=self.watch.best if self.watch.best is not None else value,
                best_round=self.watch.best_round,
                seconds=time.perf_counter() - began,
            )
        )
        return verdict if verdict.stop and seen.reason != "diverged" else seen

    def _finish(self, verdict: Verdict, samples: int, clock: Clock) -> StopReport:
        phase("final report")
        best_round = self.watch.best_round if self.watch.best is not None else None
        missing = self.checkpoints.missing(self.progress.rounds, verdict.reason, best_round)
        stop = StopReport(
            round=self.progress.rounds,
            reason=verdict.reason,
            best=self.watch.best,
            best_round=best_round,
            final=self.watch.last,
            samples=samples,
            seconds=clock.elapsed_s(),
            checkpoints=self.comm.broadcast(self.checkpoints.kept() if self.comm.rank == 0 else {}),
            missing=missing,
        )
        self.recorder.report(stop)
        return stop


def _nothing_counted(metric: str, saved: bool) -> ConfigError:
    error = ConfigError(
        f"evaluate.metric = {metric!r}: the task counted nothing for it in the validation data, so that it "
        "has no value; expected a count of at least 1."
        + (" A checkpoint of this round was written." if saved else "")
    )
    error.agreed = True
    return error
