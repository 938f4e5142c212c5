"""What is said of a run: its speed, its stragglers and why, what will stop it, the layer that stands out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hvd_train.monitor import analysis
from hvd_train.monitor.history import History
from tests.unit.monitor.logs import Log, history_of


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def read(tmp_path: Path) -> History:
    return history_of(tmp_path / "events.jsonl")


def test_speed_and_shares_are_those_of_the_last_seconds(log: Log, tmp_path: Path) -> None:
    log.begin()
    assert analysis.samples_per_s(read(tmp_path)) is None
    assert analysis.shares(read(tmp_path)) == {}
    log.rounds(1, 50, samples=7, slow={1: 9.0})
    log.rounds(51, 100, samples=640)
    log.log.close()
    history = read(tmp_path)
    assert analysis.samples_per_s(history) == pytest.approx(640)
    assert [r.round for r in analysis.recent(history)] == list(range(71, 101))
    expected = {"data": 0.1 / 1.1, "compute": 0.9 / 1.1, "communication": 0.1 / 1.1, "wait": 0.0}
    assert analysis.shares(history) == pytest.approx(expected)


def test_speed_is_of_this_start(log: Log, tmp_path: Path) -> None:
    log.begin()
    log.rounds(1, 5)
    log.now += 5
    log.begin(5)
    log.rounds(6, 6)
    assert analysis.samples_per_s(read(tmp_path)) is None
    log.rounds(7, 8, samples=100)
    assert analysis.samples_per_s(read(tmp_path)) == pytest.approx(100)


def test_ranks_that_the_others_wait_for_are_named_the_slowest_first(log: Log, tmp_path: Path) -> None:
    log.begin()
    log.rounds(1, 9)
    assert analysis.stragglers(read(tmp_path)) == []
    log.observe(9)
    log.rounds(10, 10, slow={1: 2.0, 3: 4.0})
    first, second = analysis.stragglers(read(tmp_path))
    assert (first.rank, first.host, first.phase) == (3, "h2", "compute")
    assert first.factor == pytest.approx(4.0 / 1.5, rel=1e-3)
    assert str(second) == "rank 1 on h1 is busy 1.3 times as long as the median, in local steps"


def test_why_a_rank_is_slow(log: Log, tmp_path: Path) -> None:
    log.begin()
    log.rounds(1, 1, slow={0: 3.0})
    log.observe(1, throttled=[0.3, 0, 0, 0])
    (straggler,) = analysis.stragglers(read(tmp_path))
    assert straggler.why == "the CPU limit of its cgroup holds it back in 30% of the periods"
    log.observe(2, cpu=[0.2, 1, 1, 1])
    (straggler,) = analysis.stragglers(read(tmp_path))
    assert straggler.why.startswith("it gets 0.20 cores, the median rank 1.00")


def test_one_rank_is_no_straggler(tmp_path: Path) -> None:
    log = Log(tmp_path, ranks=1, hosts=("h1",))
    log.begin()
    log.rounds(1, 3)
    assert analysis.stragglers(read(tmp_path)) == []


def test_patience_that_is_left(log: Log, tmp_path: Path) -> None:
    log.begin(stop_rules={"patience": 3, "max_rounds": 100, "max_epochs": 30, "target_error": 0.01})
    log.rounds(1, 10)
    assert analysis.patience_left(read(tmp_path)) == (3, 3)
    for number, error, best, at in ((10, 0.3, 0.3, 10), (20, 0.4, 0.3, 10), (30, 0.35, 0.3, 10)):
        log.rounds(number + 1, number + 10)
        log.evaluate(number, error, best, at)
    history = read(tmp_path)
    assert analysis.patience_left(history) == (1, 3)
    assert analysis.what_will_stop(history) == (
        "1 of 3 evaluations without improvement left, or error at 0.0100, or 70 rounds to the limit, or 20.0 "
        "epochs to the limit"
    )


def test_patience_of_a_run_that_ended_by_it_is_counted_from_its_resume(log: Log, tmp_path: Path) -> None:
    log.begin(stop_rules={"patience": 2})
    for number in (10, 20, 30):
        log.evaluate(number, 0.3, 0.3, 10)
    assert analysis.patience_left(read(tmp_path)) == (0, 2)
    log.stop(30, "patience")
    again = Log(tmp_path)
    again.begin(30, stop_rules={"patience": 2})
    assert analysis.patience_left(read(tmp_path)) == (2, 2)
    again.evaluate(40, 0.4, 0.3, 10)
    assert analysis.patience_left(read(tmp_path)) == (1, 2)


def test_without_rules_nothing_will_stop_it(log: Log, tmp_path: Path) -> None:
    log.begin(stop_rules={})
    assert analysis.patience_left(read(tmp_path)) is None
    assert analysis.what_will_stop(read(tmp_path)) == ""


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ((0.1, 0.1, 0.1), ""),
        ((0.1, 0.2, 30.0), "`last.weight` moves much in each step: log10 of its relative step is -0.5"),
        ((1e-4, 2e-5, 2e-5), ""),
        ((0.0, 0.0, 0.1), "`first.weight` does not move at all"),
        ((9.0, 30.0, 9.0), ""),
        ((0.1, 1e-5, 0.1), "`first.bias` hardly learns: log10 of its relative step is -7.0"),
        ((0.0, 0.1, 1.0), "`first.weight` does not move at all"),
        ((math.nan, 0.1, 0.1), ""),
    ],
)
def test_the_layer_that_stands_out(
    update: tuple[float, ...], sentence: str, log: Log, tmp_path: Path
) -> None:
    log.begin()
    assert analysis.odd_layer(read(tmp_path)) == ""
    log.observe(1, update=update)
    found = analysis.odd_layer(read(tmp_path))
    assert found.startswith(sentence)
    assert bool(found) is bool(sentence)
