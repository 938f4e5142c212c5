"""What Prometheus is served, by its own parser; and the dashboard for Grafana."""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hvd_train.errors import ConfigError, EnvironmentMismatch
from hvd_train.record.metrics import Metrics
from hvd_train.record.reports import CheckpointReport, FaultReport, MachineReport
from tests.deadlines import seconds
from tests.launching import ROOT
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

RANKS = dataclasses.replace(
    HEADER, host_of_rank=[rank % len(HEADER.hosts) for rank in range(HEADER.world_size)]
)


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics(0, "127.0.0.1")  # any free port
    yield made
    made.close()


def served(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample: its name and the values of its labels."""
    url = f"http://127.0.0.1:{metrics.port}/metrics"
    text = urllib.request.urlopen(url, timeout=seconds(30)).read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
    return found


def record_all(metrics: Metrics) -> None:
    metrics.record(RANKS)
    for number in (1, 2):
        metrics.record(round_report(number))
    metrics.record(evaluation(2, 0.25, 0.125, 1))
    metrics.record(CheckpointReport(round=2, path="p", reason="best", num_bytes=5, seconds=0.5))
    metrics.record(FaultReport(round=2, kind="not_finite", ranks=(1,), message="x"))
    for sent in (100, 350):
        metrics.record(
            MachineReport(
                round=2,
                rss_bytes=[1000 + rank for rank in range(HEADER.world_size)],
                cpu=[0.5] * HEADER.world_size,
                throttled=[0.0] * HEADER.world_size,
                available_bytes=[7] * len(HEADER.hosts),
                sent_bytes=sent,
            )
        )


def test_figures_of_a_run(metrics: Metrics) -> None:
    record_all(metrics)
    found = served(metrics)
    report = round_report(2)
    assert found["hvd_train_round",] == 2
    assert found["hvd_train_ranks",] == HEADER.world_size
    assert found["hvd_train_samples_total",] == 2 * report.samples
    assert found["hvd_train_loss",] == report.loss
    assert found["hvd_train_phase_seconds_total", "compute"] == pytest.approx(
        2 * report.seconds["compute"].median
    )
    assert (found["hvd_train_error",], found["hvd_train_error_best",]) == (0.25, 0.125)
    assert (found["hvd_train_checkpoints_total",], found["hvd_train_checkpoint_seconds_total",]) == (1, 0.5)
    assert found["hvd_train_faults_total", "not_finite"] == 1
    assert found["hvd_train_sent_bytes_total",] == 350
    assert found["hvd_train_running",] == 1
    ranks = {
        key[-1]: value for key, value in found.items() if key[0] == "hvd_train_rank_resident_memory_bytes"
    }
    assert ranks == {str(rank): 1000 + rank for rank in range(HEADER.world_size)}
    (info,) = [key for key in found if key[0] == "hvd_train_run_info"]
    assert HEADER.model in info
    metrics.record(STOP)
    found = served(metrics)
    assert (found["hvd_train_running",], found["hvd_train_stopped", STOP.reason]) == (0, 1)


def test_the_dashboard_for_grafana_asks_for_what_is_served(metrics: Metrics) -> None:
    record_all(metrics)
    metrics.record(STOP)
    names = {key[0] for key in served(metrics)}
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"hvd_train_\w+", target["expr"])
    }
    assert len(dashboard["panels"]) >= 8
    assert asked
    assert asked <= names


def test_a_port_in_use(metrics: Metrics) -> None:
    with pytest.raises(ConfigError, match=rf"record.metrics_port = {metrics.port}: 127\.0\.0\.1 cannot be"):
        Metrics(metrics.port, "127.0.0.1")


def test_an_address_that_is_not_of_this_host() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 cannot be listened on"):
        Metrics(9999, "192.0.2.1")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(EnvironmentMismatch, match=r"pip install 'hvd_train\[metrics\]'"):
        Metrics(9999, "127.0.0.1")
