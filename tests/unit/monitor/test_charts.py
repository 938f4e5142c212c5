"""What is drawn, by its numbers: the same figures go to the page and into the report."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.monitor.charts import figure
from hvd_train.monitor.charts.figure import Chart, thinned, upright
from hvd_train.monitor.charts.layers import MOST_LINES, layer_charts
from hvd_train.monitor.charts.ranks import rank_charts
from hvd_train.monitor.charts.run import run_charts
from hvd_train.monitor.history import History
from hvd_train.record.reports import PHASES
from tests.unit.monitor.logs import LAYERS, Log, history_of, whole
from tests.unit.run_reports import evaluation


def numbers(packed: dict[str, str]) -> np.ndarray:
    found = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])
    return found.reshape([int(n) for n in packed["shape"].split(",")]) if "shape" in packed else found


def named(charts: list[Chart]) -> dict[str, Chart]:
    assert len({chart.name for chart in charts}) == len(charts)
    json.dumps([[chart.data, chart.layout] for chart in charts], allow_nan=False)
    return {chart.name: chart for chart in charts}


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path)
    log.begin()
    return log


def read(log: Log, tmp_path: Path) -> History:
    return history_of(tmp_path / "events.jsonl")


def test_every_chart_says_what_it_means(tmp_path: Path) -> None:
    history = history_of(whole(tmp_path))
    charts = [*run_charts([("a", history)]), *rank_charts(history), *layer_charts(history)]
    assert set(named(charts)) == {
        *("error", "loss", "metric-0", "schedule", "speed", "shares"),
        *("lanes", "busy", "memory", "available", "cpu", "steps", "gradients", "spread"),
    }
    for chart in charts:
        assert chart.meaning.endswith("."), chart.name
        assert chart.title, chart.name


def test_the_error_with_its_stop_rules(log: Log, tmp_path: Path) -> None:
    log.begin(stop_rules={"patience": 5, "target_error": 0.05})
    for number, error in enumerate((0.5, 0.2, 0.3, 0.25), 1):
        log.rounds(number, number)
        log.evaluate(number, error, min(0.2, error) if number > 1 else 0.5, min(number, 2))
    chart = named(run_charts([("a", read(log, tmp_path))]))["error"]
    curve, best, target = chart.data
    assert numbers(curve["x"]).tolist() == [1, 2, 3, 4]
    assert numbers(curve["y"]).tolist() == [0.5, 0.2, 0.3, 0.25]
    assert (best["x"], best["y"]) == ([2.0], [0.2])
    assert (target["name"], target["x"], target["y"]) == ("target 0.05", [1.0, 4.0], [0.05, 0.05])
    assert [note["text"] for note in chart.layout["annotations"]] == ["patience: 3 of 5 evaluations left"]
    assert chart.layout["shapes"][0]["y0"] == 0.2


def test_the_end_of_a_run_is_on_its_curve(tmp_path: Path) -> None:
    chart = named(run_charts([("a", history_of(whole(tmp_path)))]))["error"]
    assert [note["text"] for note in chart.layout["annotations"]] == ["stopped: patience"]


@pytest.mark.parametrize("over", ["rounds", "samples", "seconds"])
def test_the_horizontal_axis(tmp_path: Path, over: Any) -> None:
    history = history_of(whole(tmp_path))
    charts = named(run_charts([("a", history)], over))
    last = {
        "rounds": 60.0,
        "samples": float(sum(line.samples for line in history.rounds)),
        "seconds": float(history.seconds()[-1]),
    }[over]
    assert numbers(charts["error"].data[0]["x"])[-1] == last
    assert numbers(charts["loss"].data[0]["x"])[-1] == last
    assert charts["loss"].layout["xaxis"]["title"]["text"].startswith(over)


def test_the_drift_is_drawn_where_it_was_measured(log: Log, tmp_path: Path) -> None:
    log.rounds(1, 4, drift=None)
    log.rounds(5, 5, drift=0.5)
    log.rounds(6, 9, drift=None)
    log.rounds(10, 10, drift=0.25)
    (line,) = named(run_charts([("a", read(log, tmp_path))]))["drift"].data
    assert (numbers(line["x"]).tolist(), numbers(line["y"]).tolist()) == ([5.0, 10.0], [0.5, 0.25])


def test_a_comparison_has_a_line_for_each_run_and_no_shares(tmp_path: Path) -> None:
    runs = [(name, history_of(whole(tmp_path / name))) for name in ("a", "b")]
    charts = named(run_charts(runs))
    assert [line["name"] for line in charts["error"].data] == ["a", "b"]
    assert [line["name"] for line in charts["loss"].data] == ["a", "b"]
    assert [line["name"] for line in charts["schedule"].data] == ["a", "b", "a: period", "b: period"]
    assert "shares" not in charts


def test_runs_that_watch_different_metrics_are_compared_in_both(tmp_path: Path) -> None:
    for name, metric in (("a", "error"), ("b", "loss")):
        log = Log(tmp_path / name)
        log.begin(metric=metric)
        log.rounds(1, 2)
        log.log.report(dataclasses.replace(evaluation(2, 0.5, 0.5, 2), metrics={"error": 0.5, "loss": 0.25}))
        if metric == "loss":
            log.log.report(dataclasses.replace(evaluation(2, 0.25, 0.25, 2), metrics={"error": 0.5}))
    runs = [(name, history_of(tmp_path / name / "events.jsonl")) for name in ("a", "b")]
    charts = named(run_charts(runs))
    assert charts["error"].title == "error"
    assert [numbers(line["y"]).tolist() for line in charts["error"].data] == [[0.5], [0.5, 0.5]]
    assert charts["metric-0"].title == "loss in the evaluations"
    assert [numbers(line["y"])[-1] for line in charts["metric-0"].data] == [0.25, 0.25]
    assert charts["metric-0"].meaning == "The stop rules of some runs follow it."


def test_a_run_that_was_resumed_under_another_name_begins_with_its_samples(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin(40, stop_rules={"patience": 5})
    log.rounds(41, 44)
    log.log.report(dataclasses.replace(evaluation(44, 0.5, 0.25, 30), samples=14_062))
    log.rounds(45, 46)
    history = read(log, tmp_path)
    per_round = history.rounds[0].samples
    assert history.samples().tolist() == [14_062 + i * per_round for i in range(-3, 3)]
    chart = named(run_charts([("a", history)], "samples"))["error"]
    assert numbers(chart.data[0]["x"]).tolist() == [14_062.0]
    assert chart.layout["annotations"] == [], "what patience is left is in another log"


def test_a_run_without_rounds_has_no_charts(log: Log, tmp_path: Path) -> None:
    history = read(log, tmp_path)
    assert run_charts([("a", history)]) == rank_charts(history) == layer_charts(history) == []


def test_shares_of_the_phases_add_up(tmp_path: Path) -> None:
    chart = named(run_charts([("a", history_of(whole(tmp_path)))]))["shares"]
    assert {line["name"] for line in chart.data} == set(PHASES)
    total = sum(numbers(line["y"]) for line in chart.data)
    assert total.tolist() == pytest.approx([1.0] * len(total))


def test_lanes_begin_together_and_the_slow_rank_is_marked(log: Log, tmp_path: Path) -> None:
    log.rounds(1, 10, slow={2: 3.0})
    chart = named(rank_charts(read(log, tmp_path)))["lanes"]
    begins = {tuple(numbers(bars["base"])) for bars in chart.data if bars["name"] == "data"}
    assert len(begins) == 6
    assert all(len(set(begin)) == 1 for begin in begins)
    hosts, ranks = chart.data[0]["y"]
    assert hosts == ["h1", "h1", "h2", "h2"]
    assert ranks == ["0", "1", "2 ◀ slow", "3"]
    waits = [numbers(bars["x"]) for bars in chart.data if bars["name"] == "wait"]
    assert all(wait.argmin() == 2 for wait in waits)


def test_lanes_of_many_ranks_are_those_of_the_busiest_and_the_heat_map_has_all(tmp_path: Path) -> None:
    log = Log(tmp_path, ranks=1024, hosts=[f"h{i}" for i in range(16)])
    log.begin()
    log.rounds(1, 3, slow={700: 3.0})
    charts = named(rank_charts(read(log, tmp_path)))
    _, ranks = charts["lanes"].data[0]["y"]
    assert len(ranks) == 32
    assert "700 ◀ slow" in ranks
    busy = numbers(charts["busy"].data[0]["z"])
    assert busy.shape == (1024, 3)
    assert busy[700].tolist() == pytest.approx([3.0] * 3)
    assert np.delete(busy, 700, axis=0).ravel().tolist() == pytest.approx([1.0] * 3069)


def test_memory_of_many_ranks_is_least_median_and_most(tmp_path: Path) -> None:
    log = Log(tmp_path, ranks=100, hosts=["h"])
    log.begin()
    log.rounds(1, 3)
    log.observe(3, cpu=[*range(100)])
    chart = named(rank_charts(read(log, tmp_path)))["cpu"]
    assert [line["name"] for line in chart.data] == ["least", "median", "most"]
    assert [numbers(line["y"]).tolist() for line in chart.data] == [[0.0], [49.5], [99.0]]


def test_throttling_is_drawn_where_there_is_any(log: Log, tmp_path: Path) -> None:
    log.rounds(1, 3)
    log.observe(3)
    assert "throttled" not in named(rank_charts(read(log, tmp_path)))
    log.observe(4, throttled=[0, 0, 0.5, 0])
    assert "throttled" in named(rank_charts(read(log, tmp_path)))


def test_layers_have_a_line_each_with_the_healthy_band(log: Log, tmp_path: Path) -> None:
    log.rounds(1, 3)
    log.observe(3, update=(0.1, 1e-9, 0.0))
    chart = named(layer_charts(read(log, tmp_path)))["steps"]
    assert [line["name"] for line in chart.data] == list(LAYERS)
    first, second, third = (numbers(line["y"])[0] for line in chart.data)
    assert (first, second) == pytest.approx((-3.0, -11.0))
    assert np.isnan(third), "a layer that does not move has no logarithm"
    (band,) = chart.layout["shapes"]
    assert (band["y0"], band["y1"]) == (-4.0, -2.0)


def test_many_layers_are_a_heat_map(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_train.monitor.charts.layers.MOST_LINES", 2)
    assert len(LAYERS) < MOST_LINES
    log.rounds(1, 3)
    log.observe(3)
    chart = named(layer_charts(read(log, tmp_path)))["steps"]
    assert chart.data[0]["type"] == "heatmap"
    assert numbers(chart.data[0]["z"]).ravel().tolist() == pytest.approx([-3.0] * 3)


def test_a_thinned_line_keeps_its_ends_and_peaks() -> None:
    x = np.arange(100_003.0)
    y = np.sin(x / 1000)
    y[[12_345, 77_777]] = (9.0, -9.0)
    y[50_000:50_500] = np.nan
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) < 1.2 * figure.MOST_POINTS
    assert (kept_x[0], kept_x[-1]) == (0.0, 100_002.0)
    assert (np.diff(kept_x) > 0).all()
    assert {9.0, -9.0} <= set(kept_y)
    assert kept_y[np.isfinite(kept_y)].tolist() == y[kept_x[np.isfinite(kept_y)].astype(int)].tolist()


def test_a_short_line_is_whole() -> None:
    x = np.arange(figure.MOST_POINTS, dtype=float)
    assert thinned(x, x)[0] is x


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.5, 0.4], None),
        ([0.5, 0.001], "log"),
        ([1.0, 1e-9], "log"),
        ([0.5, 0.0], None),
        ([-1.0, 5.0], None),
        ([], None),
    ],
)
def test_an_axis_is_logarithmic_where_positive_values_differ_much(
    values: list[float], kind: str | None
) -> None:
    assert upright(np.array([*values, np.nan])).get("type") == kind
