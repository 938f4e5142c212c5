"""The watch: every rule, rules together, metrics that are maximised, and a watch that was saved."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Literal

import numpy as np
import pytest

from hvd_train.algorithm.header import Header, Row
from hvd_train.algorithm.stopping import GO_ON, Verdict, Watch
from hvd_train.config import StopConfig
from hvd_train.record.wording import REASONS


def header(*rows: Row) -> Header:
    return Header(np.array([astuple(row) for row in rows]))


HEALTHY = header(Row(samples=8, loss_sum=4), Row(samples=8, loss_sum=2))
HALF_SICK = header(Row(samples=8, loss_sum=4), Row(samples=8, loss_sum=2, finite=0))
ALL_SICK = header(Row(samples=8, loss_sum=4, finite=0), Row(samples=8, loss_sum=math.nan))
ASKED = header(Row(samples=8, loss_sum=4), Row(samples=8, loss_sum=2, stop=1))


def rules(**changes: Any) -> StopConfig:
    """Only the rules that are named; one that never holds here stands for "none"."""
    return StopConfig(**{"patience": 0, "max_seconds": 1e9, **changes})


def reasons(watch: Watch, errors: Sequence[float], first: int = 1) -> list[str]:
    return [watch.after_evaluation(i, error).reason for i, error in enumerate(errors, first)]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_evaluations_without_improvement(patience: int) -> None:
    watch = Watch(rules(patience=patience))
    assert reasons(watch, [0.5, 0.4, 0.3]) == ["", "", ""]
    rest = [0.3, 0.9, 0.31][:patience]
    assert reasons(watch, rest, first=4) == [""] * (patience - 1) + ["patience"]
    assert (watch.best, watch.best_round, watch.last) == (0.3, 3, rest[-1])


def test_an_improvement_begins_the_patience_anew() -> None:
    watch = Watch(rules(patience=2))
    assert reasons(watch, [0.5, 0.6, 0.4, 0.6, 0.3, 0.6, 0.6]) == [""] * 6 + ["patience"]


def test_patience_0_is_off() -> None:
    assert reasons(Watch(rules()), [0.5] + [0.9] * 1000) == [""] * 1001


def test_an_improvement_must_be_larger_than_min_delta() -> None:
    watch = Watch(rules(patience=3, min_delta=0.125))
    assert reasons(watch, [1.0, 0.875, 0.8125]) == ["", "", ""]
    assert (watch.best, watch.best_round) == (0.8125, 3), "0.875 was not smaller by more than that"
    assert reasons(watch, [0.8, 0.75, 0.6875], first=4) == ["", "", "patience"]
    assert (watch.best, watch.best_round, watch.last) == (0.8125, 3, 0.6875)


def test_target_error_at_and_below() -> None:
    assert reasons(Watch(rules(target_error=0.25)), [0.5, 0.2501, 0.25]) == ["", "", "target_error"]
    assert reasons(Watch(rules(target_error=0.0)), [0.1, 0.0]) == ["", "target_error"]


def test_a_metric_that_is_maximised() -> None:
    watch = Watch(rules(patience=2, target_error=0.9, min_delta=0.01), "max")
    assert reasons(watch, [0.5, 0.7, 0.705, 0.6]) == ["", "", "", "patience"]
    assert (watch.best, watch.best_round, watch.improved_at(2)) == (0.7, 2, True)
    assert reasons(Watch(rules(target_error=0.9), "max"), [0.5, 0.89, 0.9]) == ["", "", "target_error"]
    assert reasons(Watch(rules(target_error=0.9), "max"), [0.95]) == ["target_error"]


def test_divergence_is_a_multiple_of_the_best() -> None:
    watch = Watch(rules(divergence=2.0))
    assert reasons(watch, [0.5, 1.0, 0.25, 0.5, 0.51]) == ["", "", "", "", "diverged"]
    assert reasons(Watch(rules(divergence=2.0)), [0.0, 0.5]) == ["", ""], "nothing is a multiple of 0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_an_error_that_is_not_finite_is_divergence(value: float, mode: Literal["min", "max"]) -> None:
    watch = Watch(rules(patience=1), mode)
    assert reasons(watch, [0.5, value]) == ["", "diverged"]
    assert (watch.best, watch.best_round) == (0.5, 1), "the best stays"
    fresh = Watch(rules(), mode)
    assert reasons(fresh, [value]) == ["diverged"]
    assert fresh.best is None


@pytest.mark.parametrize(
    ("rule", "seen", "reason"),
    [
        ({"max_rounds": 5}, (4, 9, 9.0), ""),
        ({"max_rounds": 5}, (5, 0, 0.0), "max_rounds"),
        ({"max_rounds": 5}, (6, 0, 0.0), "max_rounds"),
        ({"max_epochs": 2}, (99, 1, 9.0), ""),
        ({"max_epochs": 2}, (1, 2, 0.0), "max_epochs"),
        ({"max_seconds": 1.5}, (99, 9, 1.49), ""),
        ({"max_seconds": 1.5}, (1, 0, 1.5), "max_seconds"),
        ({"max_rounds": 5, "max_epochs": 2, "max_seconds": 1.0}, (4, 1, 0.9), ""),
        ({"max_rounds": 5, "max_epochs": 2, "max_seconds": 1.0}, (4, 2, 2.0), "max_epochs"),
        ({"max_rounds": 5, "max_epochs": 2, "max_seconds": 1.0}, (5, 2, 2.0), "max_rounds"),
    ],
)
def test_limits(rule: dict[str, Any], seen: tuple[int, int, float], reason: str) -> None:
    assert Watch(rules(**rule)).after_round(HEALTHY, *seen) == Verdict(reason)


def test_health_and_requests_come_before_limits() -> None:
    watch = Watch(rules(max_rounds=1))
    assert watch.after_round(ALL_SICK, 1, 0, 0.0) == Verdict("diverged")
    assert watch.after_round(ASKED, 1, 0, 0.0) == Verdict("interrupted")
    assert watch.after_round(HALF_SICK, 0, 0, 0.0) == GO_ON, "the healthy rank goes on"
    assert watch.after_round(HEALTHY, 1, 0, 0.0) == Verdict("max_rounds")


def test_rules_together_first_come_first() -> None:
    together = rules(patience=2, target_error=0.1, divergence=3.0)
    assert reasons(Watch(together), [0.5, 0.6, 0.1]) == ["", "", "target_error"]
    assert reasons(Watch(together), [0.5, 1.6]) == ["", "diverged"]
    assert reasons(Watch(together), [0.5, 0.6, 1.6]) == ["", "", "diverged"]
    assert reasons(Watch(together), [0.5, 0.6, 0.7]) == ["", "", "patience"]
    both = rules(patience=1, target_error=0.5)
    assert reasons(Watch(both), [0.5]) == ["target_error"]


def test_a_verdict_stops_if_it_has_a_reason_and_every_reason_has_words() -> None:
    assert not GO_ON.stop
    assert Verdict("patience").stop
    named = {"patience", "target_error", "max_epochs", "max_rounds", "max_seconds", "diverged", "interrupted"}
    assert named == REASONS.keys()


def test_improved_at_is_true_in_the_round_of_the_best_alone() -> None:
    watch = Watch(rules())
    assert not watch.improved_at(0), "nothing was measured"
    watch.after_evaluation(4, 0.5)
    assert watch.improved_at(4)
    assert not watch.improved_at(5)
    watch.after_evaluation(8, 0.6)
    assert not watch.improved_at(8)


def copied(watch: Watch, config: StopConfig, mode: Literal["min", "max"] = "min") -> Watch:
    """A watch of another process that takes the state as a checkpoint stores it."""
    other = Watch(config, mode)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    return other


@pytest.mark.parametrize("cut", range(9))
def test_a_restored_watch_equals_an_uninterrupted_one(cut: int) -> None:
    curve = [0.5, 0.4, 0.45, 0.39, 0.41, 0.42, 0.38, 0.4, 0.41, 0.42]
    config = rules(patience=3)
    whole = Watch(config)
    expected = reasons(whole, curve)
    watch = Watch(config)
    first = reasons(watch, curve[:cut])
    watch = copied(watch, config)
    assert first + reasons(watch, curve[cut:], first=cut + 1) == expected == [""] * 9 + ["patience"]
    assert watch.state_dict() == whole.state_dict()
    assert watch.curve == [(i, e) for i, e in enumerate(curve, 1)]


def test_a_run_that_had_ended_by_patience_gets_its_patience_anew() -> None:
    config = rules(patience=2)
    watch = Watch(config)
    assert reasons(watch, [0.3, 0.5, 0.5])[-1] == "patience"
    again = copied(watch, config)
    assert reasons(again, [0.5, 0.5], first=4) == ["", "patience"]
    assert (again.best, again.best_round) == (0.3, 1)
    longer = copied(watch, rules(patience=4))
    assert reasons(longer, [0.5, 0.5], first=4) == ["", "patience"], "two of the four are used up"
    off = copied(watch, rules(patience=0))
    assert reasons(off, [0.5] * 50, first=4) == [""] * 50
