"""Logs of runs, written by the event log itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_train.monitor.history import History
from hvd_train.record.events import EventLog
from hvd_train.record.reports import (
    CheckpointReport,
    FaultReport,
    LayerReport,
    MachineReport,
    PeriodReport,
    RoundReport,
    RunStart,
    Spread,
    StopReport,
)
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

LAYERS = ("first.weight", "first.bias", "last.weight")
START_S = 1_700_000_000.0


class Log:
    """Writes the log of a run in `folder`, one second a round."""

    def __init__(self, folder: Path, ranks: int = 4, hosts: Sequence[str] = ("h1", "h2")) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.now = START_S
        self.ranks = ranks
        self.hosts = tuple(hosts)
        self.log = EventLog(folder / "events.jsonl", lambda: self.now)

    def begin(self, round_: int = 0, **changes: Any) -> RunStart:
        """A start after `round_` rounds."""
        header = dataclasses.replace(
            HEADER,
            round=round_,
            world_size=self.ranks,
            hosts=self.hosts,
            host_of_rank=[rank * len(self.hosts) // self.ranks for rank in range(self.ranks)],
            threads=[1] * self.ranks,
            layers=list(LAYERS),
            layer_sizes=[100, 10, 20],
            **changes,
        )
        self.log.header(header)
        return header

    def rounds(self, first: int, last: int, slow: dict[int, float] | None = None, **changes: Any) -> None:
        """Rounds of half a second in `compute`, and of more on the ranks in `slow`."""
        busy = np.full(self.ranks, 0.5)
        for rank, factor in (slow or {}).items():
            busy[rank] *= factor
        by_rank = np.stack([busy * 0.1, busy * 0.9, np.full(self.ranks, 0.05), busy.max() - busy])
        seconds = {
            phase: Spread(float(row.min()), float(np.median(row)), float(row.max()))
            for phase, row in zip(("data", "compute", "communication", "wait"), by_rank, strict=True)
        }
        for number in range(first, last + 1):
            self.now += 1
            report: RoundReport = round_report(number, seconds=seconds, by_rank=by_rank)
            self.log.report(dataclasses.replace(report, **changes))

    def evaluate(self, number: int, error: float, best: float, best_round: int) -> None:
        self.log.report(evaluation(number, error, best, best_round))

    def observe(
        self,
        number: int,
        *,
        update: Sequence[float] = (0.1, 0.1, 0.1),
        cpu: Sequence[float] = (),
        throttled: Sequence[float] = (),
    ) -> None:
        """Layers of norm 10 that move by `update` in 10 local steps; and the machine."""
        count = len(LAYERS)
        self.log.report(
            MachineReport(
                round=number,
                rss_bytes=[1 << 30] * self.ranks,
                cpu=list(cpu) or [1.0] * self.ranks,
                throttled=list(throttled) or [0.0] * self.ranks,
                available_bytes=[8 << 30] * len(self.hosts),
                sent_bytes=1000 * number,
            )
        )
        self.log.report(
            LayerReport(
                round=number,
                period=10,
                norm=[10.0] * count,
                update=list(update),
                gradient={name: [0.5] * count for name in ("min", "mean", "max")},
                gradient_peak=[1.0] * count,
            )
        )

    def checkpoint(self, number: int) -> None:
        self.log.report(
            CheckpointReport(
                round=number, path=f"round-{number}", reason="best", num_bytes=1000, seconds=0.25
            )
        )

    def fault(self, number: int, message: str = "rank 1 was not finite") -> None:
        self.log.report(FaultReport(round=number, kind="not_finite", ranks=(1,), message=message))

    def period(self, number: int, message: str) -> None:
        self.log.report(PeriodReport(round=number, period=20, message=message))

    def stop(self, number: int, reason: str = "patience", **changes: Any) -> None:
        report: StopReport = dataclasses.replace(STOP, round=number, reason=reason, **changes)
        self.log.report(report)
        self.log.close()


def history_of(path: Path) -> History:
    """What is in a log."""
    history = History(path)
    history.update()
    return history


def whole(folder: Path) -> Path:
    """A log with every kind of event, a resume that undoes rounds, and the end."""
    log = Log(folder)
    log.begin()
    log.rounds(1, 20)
    log.observe(20)
    log.evaluate(20, 0.3, 0.3, 20)
    log.checkpoint(20)
    log.rounds(21, 30, slow={3: 3.0})
    log.observe(30)
    log.evaluate(30, 0.2, 0.2, 30)
    log.fault(30)
    log.begin(20)
    log.rounds(21, 60, slow={2: 2.0})
    log.observe(60, update=(0.1, 1e-9, 0.1))
    log.evaluate(60, 0.25, 0.25, 60)
    log.stop(60)
    return folder / "events.jsonl"
