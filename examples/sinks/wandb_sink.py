"""Records a run in Weights & Biases: `record.sinks = ["examples/sinks/wandb_sink.py:make"]`.

On nodes without a way to the network set WANDB_MODE=offline, and send the files later by `wandb sync`.
"""

from __future__ import annotations

import os
from typing import Any

import wandb

from hvd_train.record.reports import EvaluationReport, Report, RoundReport, RunStart, StopReport


class WeightsAndBiases:
    """Takes the events of one run."""

    def __init__(self) -> None:
        self.run: Any = None

    def record(self, event: RunStart | Report) -> None:
        if isinstance(event, RunStart):
            known = {
                "task": event.task,
                "model": event.model,
                "ranks": event.world_size,
                "period": event.period,
            }
            name = os.path.basename(event.run)
            self.run = wandb.init(project="hvd_train", name=name, dir=event.run, config=known)
        elif isinstance(event, RoundReport):
            self.run.log({"round": event.round, "training/loss": event.loss, "training/lr": event.lr})
        elif isinstance(event, EvaluationReport):
            named = {f"evaluation/{name}": value for name, value in event.metrics.items()}
            self.run.log({"round": event.round, **named})
        elif isinstance(event, StopReport):
            self.run.summary["reason"] = event.reason

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def make() -> WeightsAndBiases:
    return WeightsAndBiases()
