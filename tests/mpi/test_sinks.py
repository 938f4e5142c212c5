"""A real job with every sink at once: TensorBoard, Prometheus, and the examples of MLflow and Weights &
Biases."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.deadlines import seconds
from tests.launching import ROOT, Process, command, ranks_of, start
from tests.mpi.jobs import events
from tests.mpi.test_resume import LONG, wait_for_rounds

pytestmark = pytest.mark.mpi

EXAMPLES = [f"{ROOT}/examples/sinks/{name}_sink.py:make" for name in ("mlflow", "wandb")]


def free_port() -> int:
    """One that the kernel gives to nobody by itself in the meantime."""
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def scraped(port: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=seconds(30)) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {sample.name: sample.value for family in families for sample in family.samples}


def interrupt(process: Process) -> None:
    os.kill(ranks_of(process)[0], signal.SIGUSR1)
    out, err = process.communicate(timeout=seconds(90))
    assert process.returncode == 0, out + err


def test_every_sink_takes_the_run_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps its runs in files, which it has to be allowed; W&B sends nothing."""
    stores = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"}
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    folder, port = tmp_path / "r", free_port()
    options = ["--runs", str(tmp_path), "--record.tensorboard", "--metrics-port", str(port)]
    argv = command(
        "mpirun", 2, ["-m", "hvd_train", *options, "--record.sinks", *EXAMPLES, "--name", "r", *LONG]
    )
    with start(argv, env={**stores, **offline}) as process:
        wait_for_rounds(folder, 12, process)
        found = scraped(port)
        assert found["hvd_train_ranks"] == 2
        assert found["hvd_train_running"] == 1
        interrupt(process)
    last = events(folder, "round")[-1]["round"]
    resumed = ["-m", "hvd_train", *options, "--resume", str(folder), "--record.sinks", *EXAMPLES]
    with start(command("mpirun", 2, resumed), env={**stores, **offline}) as process:
        wait_for_rounds(folder, last + 6, process)
        assert scraped(port)["hvd_train_round"] > last
        interrupt(process)

    evaluations = {event["round"]: event["error"] for event in events(folder, "evaluation")}
    assert max(evaluations) > last
    reads_tensorboard(folder, evaluations)
    for name, value in stores.items():
        monkeypatch.setenv(name, value)
    reads_mlflow(evaluations)
    offline_runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(offline_runs) == 2
    assert all(file.stat().st_size > 1000 for file in offline_runs)


def reads_tensorboard(folder: Path, evaluations: dict[int, float]) -> None:
    board = EventAccumulator(str(folder))
    board.Reload()
    for tag in ("training/loss", "training/learning_rate", "evaluation/error", "seconds/compute"):
        assert tag in board.Tags()["scalars"]
    assert {e.step: e.value for e in board.Scalars("evaluation/error")} == pytest.approx(evaluations)


def reads_mlflow(evaluations: dict[int, float]) -> None:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("hvd_train")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == ["r", "r"]
    found = {}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["reason"] == "interrupted"
        assert run.data.params["ranks"] == "2"
        curve = client.get_metric_history(run.info.run_id, "evaluation/error")
        found |= {metric.step: metric.value for metric in curve}
    assert found == pytest.approx(evaluations)
