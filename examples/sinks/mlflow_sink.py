"""Records a run in MLflow: `record.sinks = ["examples/sinks/mlflow_sink.py:make"]`.

Where it goes is what MLFLOW_TRACKING_URI says: the address of a server, or `file:///FOLDER`, for which newer
versions of MLflow want MLFLOW_ALLOW_FILE_STORE=true.
"""

from __future__ import annotations

import os
import time

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from hvd_train.record.reports import EvaluationReport, Report, RoundReport, RunStart, StopReport

EVERY_S = 1.0
"""Rounds are recorded at most once in so many seconds."""


class MLflow:
    """Takes the events of one run."""

    def __init__(self) -> None:
        self.client = MlflowClient()
        self.run = ""
        self.last_s = 0.0

    def record(self, event: RunStart | Report) -> None:
        if isinstance(event, RunStart):
            self.begin(event)
        elif isinstance(event, RoundReport) and time.monotonic() - self.last_s >= EVERY_S:
            self.last_s = time.monotonic()
            self.log(event.round, {"training/loss": event.loss, "training/lr": event.lr})
        elif isinstance(event, EvaluationReport):
            self.log(event.round, {f"evaluation/{name}": value for name, value in event.metrics.items()})
        elif isinstance(event, StopReport):
            self.client.set_tag(self.run, "reason", event.reason)
            self.client.set_terminated(self.run, "FAILED" if event.reason == "diverged" else "FINISHED")

    def begin(self, start: RunStart) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hvd_train")
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run = self.client.create_run(number, run_name=os.path.basename(start.run)).info.run_id
        known = {"task": start.task, "model": start.model, "ranks": start.world_size, "period": start.period}
        params = [Param(key, str(value)) for key, value in known.items()]
        self.client.log_batch(self.run, params=params)

    def log(self, round_: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [Metric(name, value, now, round_) for name, value in values.items()])


def make() -> MLflow:
    return MLflow()
