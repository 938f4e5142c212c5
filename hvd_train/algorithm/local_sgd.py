"""The algorithm: k local steps on every rank, a header, a weighted average, an evaluation now and then.

Local SGD with periodic parameter averaging (Stich, "Local SGD Converges Fast and Communicates Little",
ICLR 2019; McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017), each rank weighted by the samples that it used.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from hvd_train.algorithm.evaluate import Evaluator
from hvd_train.algorithm.header import Header
from hvd_train.algorithm.left_out import LeftOut
from hvd_train.algorithm.observer import Observer
from hvd_train.algorithm.period.base import Done, Limit, Period, own_limit
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.schedule import LearningRate
from hvd_train.algorithm.stopping import GO_ON, Verdict, Watch
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.algorithm.worker import Worker
from hvd_train.comm.agree import decided
from hvd_train.comm.base import Communicator
from hvd_train.config import EvaluateConfig
from hvd_train.errors import ConfigError
from hvd_train.io.text import listed
from hvd_train.liveness import phase
from hvd_train.record.reports import (
    PHASES,
    EvaluationReport,
    FaultReport,
    PeriodReport,
    Recorder,
    RoundReport,
    Spread,
    StopReport,
)
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.claim import Ownership
from hvd_train.run.signals import StopRequest

_NO_SUCH_ROW = (
    ", though every row was. Lower optim.lr, set optim.clip_norm, or scale large inputs and targets to about "
    "1."
)


@dataclass(kw_only=True)
class Clock:
    """Seconds of this rank, by `time.perf_counter`."""

    start: float = field(default_factory=time.perf_counter)

    def elapsed_s(self) -> float:
        """Since the training began."""
        return time.perf_counter() - self.start


@dataclass(kw_only=True)
class LocalSGD:
    """One training, ready to run: every part is constructed, and restored if the run is resumed."""

    comm: Communicator
    worker: Worker
    synchronizer: Synchronizer
    period: Period
    learning_rate: LearningRate
    evaluator: Evaluator
    watch: Watch
    checkpoints: Checkpoints
    claim: Ownership
    observer: Observer
    left_out: LeftOut
    recorder: Recorder
    stop_request: StopRequest
    progress: Progress
    evaluation: EvaluateConfig
    _limit: Limit = field(default=0, init=False)
    """What ends the next round, as rank 0 decided."""
    _unhealthy: frozenset[int] = field(default=frozenset(), init=False)
    """Ranks that were not finite in the previous round."""
    _figures_reported: bool = field(default=False, init=False)

    def run(self) -> StopReport:
        """Trains until the stop flag. Collective; every rank returns the same, except for `seconds`."""
        self.synchronizer.start()  # x_0 := the state of rank 0
        self._limit = self.comm.broadcast(self._next_limit())
        clock, began_with, verdict = Clock(), self.progress.samples, GO_ON
        while not verdict.stop:
            self.learning_rate.apply(self.progress.rounds, self.progress.samples)
            work = self.worker.run(own_limit(self._limit, self.comm.rank))  # k local steps on its own shards
            header = self.synchronizer.synchronize(
                self.progress.rounds, work, stop=self.stop_request.asked, observe=self.observer.is_due()
            )
            self._count(header)
            self._observe(header)
            verdict = self._decide(header, clock)
            evaluated = self._evaluation_is_due(verdict)
            if evaluated:
                verdict = self._evaluate(verdict)
            improved = self.watch.improved_at(self.progress.rounds)
            self.checkpoints.after_round(self.progress.rounds, verdict.reason, improved, evaluated)
        return self._finish(verdict, self.progress.samples - began_with, clock)

    def _next_limit(self) -> Limit:
        """What ends the next round, as this rank finds it."""
        done = self.progress
        return self.period.next(done.rounds, self.learning_rate.without_warm_up(done.rounds, done.samples))

    def _count(self, header: Header) -> None:
        self.progress.after_round(header)
        self.evaluator.after_round(header)
        loss, observed = header.loss, self.observer.enabled
        self.recorder.report(
            RoundReport(
                round=self.progress.rounds,
                epoch=self.progress.epoch,
                samples=header.samples,
                loss=float("nan") if loss is None else loss,
                seconds={phase: Spread(*header.spread(f"{phase}_s")) for phase in PHASES},
                by_rank=np.stack([header[f"{phase}_s"] for phase in PHASES]) if observed else None,
                period=header.period,
                steps=header["steps"].astype(int).tolist() if self.progress.rows else None,
                lr=self.learning_rate.current,
                drift=self.synchronizer.drift,
                zero_weight=tuple(int(r) for r in (header.weights == 0).nonzero()[0]),
            )
        )
        if header.unhealthy:
            self._report_unhealthy(header)
        if header.outliers:
            self.recorder.report(
                FaultReport(
                    round=self.progress.rounds,
                    kind="outlier",
                    ranks=tuple(header.outliers),
                    message=header.outlier_words,
                )
            )
        self._unhealthy = frozenset(header.unhealthy)
        self.left_out.after_round(header, self.progress.rounds)

    def _observe(self, header: Header) -> None:
        if header.observe and header.weights.any():  # without any the anchor is that of a round before
            for report in self.observer.observe(self.progress.rounds, header.period):
                self.recorder.report(report)

    def _report_unhealthy(self, header: Header) -> None:
        # A rank that keeps its values remains not finite: its rows are read again in the first round only.
        fresh = frozenset(header.unhealthy) - self._unhealthy
        where = ", as in the round before."
        if fresh:
            found = self._places(self.worker.not_finite() if self.comm.rank in fresh else "")
            where = f": {found}." if found else _NO_SUCH_ROW
        outcome = "They took the others' mean."
        if header.diverged:
            outcome = "All ranks keep the last good parameters; the run ends."
        elif len(header.unhealthy) == header.size:
            outcome = "Steps without a finite gradient were left out; there were others."
        self.recorder.report(
            FaultReport(
                round=self.progress.rounds,
                kind="not_finite",
                ranks=tuple(header.unhealthy),
                message=f"{self.synchronizer.checked} or loss of ranks {header.unhealthy} were not finite"
                f"{where} {outcome}",
            )
        )

    def _report_figures(self, figures: dict[str, float]) -> None:
        """Reports, once, which rows make the metrics of the validation data not finite. Collective."""
        names = [name for name, value in figures.items() if not math.isfinite(value)]
        if not names or self._figures_reported or not self.evaluator.num_samples:
            return
        self._figures_reported = True
        undefined = self.evaluator.undefined()
        if set(names) <= set(undefined):
            message = _not_defined(undefined)
        else:
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
        """Whether the run ends, and if not, what ends its next round."""
        done, k = self.progress, header.period
        news = self.period.after_round(
            Done(rounds=done.rounds, k=k, header=header, drift=self.synchronizer.drift)
        )
        verdict = self.watch.after_round(header, done.rounds, done.epochs, clock.elapsed_s())
        began = time.perf_counter()
        phase("stop flag")
        verdict, self._limit = decided(self.comm, (verdict, self._next_limit()), self.claim.poll)
        self.synchronizer.communication_s += time.perf_counter() - began
        if news and not verdict.stop:
            following = self._limit if isinstance(self._limit, int) else k
            self.recorder.report(PeriodReport(round=done.rounds, period=following, message=news))
        return verdict

    def _evaluation_is_due(self, verdict: Verdict) -> bool:
        """Whether to evaluate now: when an evaluation is due, and at the end. Not after an interruption, when
        time is short, and not if the first round diverged, which leaves the untrained model."""
        if verdict.stop:
            untrained = verdict.reason == "diverged" and self.progress.rounds == 1
            return verdict.reason != "interrupted" and not untrained
        return self.progress.evaluation_is_due(self.evaluation)

    def _evaluate(self, verdict: Verdict) -> Verdict:
        """Evaluates and decides whether the error ends the run. A reason that `verdict` already has is kept,
        unless the error shows that the training diverged."""
        began = time.perf_counter()
        phase("evaluation")
        figures = self.evaluator.evaluate()
        self.progress.evaluated()
        self.left_out.after_evaluation(
            *self.evaluator.left_out(), self.evaluator.num_samples, self.progress.rounds
        )
        self._report_figures(figures)
        value = self._watched(figures)
        seen = self.watch.after_evaluation(self.progress.rounds, value)
        seen = decided(self.comm, seen, self.claim.check)
        self.recorder.report(
            EvaluationReport(
                round=self.progress.rounds,
                epoch=self.progress.epoch,
                samples=self.progress.samples,
                error=value,
                metrics=figures,
                best=self.watch.best if self.watch.best is not None else value,
                best_round=self.watch.best_round,
                seconds=time.perf_counter() - began,
                passes=self.progress.passes,
            )
        )
        return verdict if verdict.stop and seen.reason != "diverged" else seen

    def _watched(self, figures: dict[str, float]) -> float:
        """The value of the watched metric. Raises `ConfigError` where it has none. Collective."""
        metric, undefined = self.evaluation.metric, self.evaluator.undefined()
        if metric in figures and (metric not in undefined or not math.isfinite(figures["loss"])):
            return figures[metric]
        self.checkpoints.save(self.progress.rounds, "every", best=False)
        why = "the task counted nothing for it in the validation data, so that it has no value"
        if metric in undefined:
            why = _not_defined(undefined).rstrip(".")
        saved = " A checkpoint of this round was written." if not self.checkpoints.failure else ""
        raise ConfigError(
            f"evaluate.metric = {metric!r}: {why}; expected a count of at least 1.{saved}", agreed=True
        )

    def _finish(self, verdict: Verdict, samples: int, clock: Clock) -> StopReport:
        phase("final report")
        self.left_out.finish(self.progress.rounds)
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
            left_out={reason: rows for reason, rows in self.left_out.totals.items() if rows},
            checkpoints=self.comm.broadcast(self.checkpoints.kept() if self.comm.rank == 0 else {}),
            missing=missing,
            passes=self.progress.passes,
        )
        self.recorder.report(stop)
        return stop


def _not_defined(names: list[str]) -> str:
    return (
        f"not defined on the validation data: {listed(names)}. An entry of a class that does not occur, or "
        "is never predicted, has no value, and neither has a mean over the classes."
    )
