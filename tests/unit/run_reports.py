"""Reports of a small run, for the tests of the event log and the console."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvd_train.record.reports import EvaluationReport, RoundReport, RunStart, Spread, StopReport

HEADER = RunStart(
    run="runs/first",
    task="classification",
    model="mlp 64-128-64-10",
    num_parameters=17226,
    world_size=2,
    hosts=("node1",),
    backend="mpi",
    lost_rank="ends the job",
    threads=[1, 1],
    period=10,
    batch_size=32,
    data="digits",
    shards_per_rank=[1, 1],
    samples_per_rank=[717, 720],
    validation_samples=360,
    metric="error",
    stop_rules={"patience": 15, "max_rounds": 2000},
    config_hash="0123abcd",
    versions={"hvd_train": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
)

STOP = StopReport(
    round=60,
    reason="patience",
    best=0.0139,
    best_round=30,
    final=0.0167,
    samples=38400,
    seconds=125.4,
    checkpoints={"best": "runs/first/checkpoints/round-30", "latest": "runs/first/checkpoints/round-60"},
)


def round_report(number: int, **changes: Any) -> RoundReport:
    """Round `number`: 640 samples, a quarter of the median time in communication and waiting."""
    report = RoundReport(
        round=number,
        epoch=number / 4,
        samples=640,
        loss=1 / number,
        seconds={
            "data": Spread(0.25, 0.5, 1.0),
            "compute": Spread(0.5, 1.0, 2.0),
            "communication": Spread(0.25, 0.375, 0.5),
            "wait": Spread(0.0, 0.125, 0.25),
        },
        period=10,
        lr=0.05,
    )
    return dataclasses.replace(report, **changes)


def evaluation(number: int, error: float, best: float, best_round: int) -> EvaluationReport:
    """The evaluation after round `number`."""
    return EvaluationReport(
        round=number,
        epoch=number / 4,
        samples=640 * number,
        error=error,
        metrics={"error": error, "loss": 0.5},
        best=best,
        best_round=best_round,
        seconds=0.25,
    )
