"""The columns of the lines of rounds, and the seconds of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hvd_train.monitor.columns import Columns
from tests.unit.monitor.logs import Log, history_of, whole


def test_columns_are_the_figures_of_the_lines(tmp_path: Path) -> None:
    history = history_of(whole(tmp_path))
    columns = history.columns
    assert columns["round"].tolist() == [line.round for line in history.rounds]
    assert columns["loss"].tolist() == [line.loss for line in history.rounds]
    assert columns.medians("compute").tolist() == [line.seconds["compute"].median for line in history.rounds]


def test_an_update_converts_the_new_lines_only_and_gives_the_same(tmp_path: Path) -> None:
    history = history_of(whole(tmp_path))
    columns = Columns()
    for count in (0, 1, 5, 5, 30, len(history.rounds)):
        columns.update(history.rounds[:count])
        assert columns["round"].tolist() == [line.round for line in history.rounds[:count]]
    before = columns["round"]
    columns.update(history.rounds)
    assert columns["round"].base is before.base, "nothing is new"


def test_lines_that_a_resume_undoes_go(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 30)
    history = history_of(tmp_path / "events.jsonl")
    assert len(history.columns["round"]) == 30
    log.begin(20)
    log.rounds(21, 35, loss=0.5)
    history.update()
    assert history.columns["round"].tolist() == list(range(1, 36))
    assert history.columns["loss"][20:].tolist() == [0.5] * 15


def test_no_value_is_not_a_number(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 2, drift=None)
    assert np.isnan(history_of(tmp_path / "events.jsonl").columns["drift"]).all()


def test_the_time_between_two_starts_does_not_count(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 10)
    log.now += 3600
    log.begin(10)
    log.rounds(11, 15)
    assert history_of(tmp_path / "events.jsonl").seconds().tolist() == pytest.approx(list(range(1, 16)))


def test_a_clock_that_is_set_back_adds_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 10)
    log.now -= 1000
    log.rounds(11, 12)
    assert history_of(tmp_path / "events.jsonl").seconds().tolist() == pytest.approx([*range(1, 11), 10, 11])
