"""Which ranks are outliers: norms, their exponential averages, weights, and what is reported."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest

from hvd_train.algorithm.header import Header, Row
from hvd_train.algorithm.outliers import Outliers
from hvd_train.errors import ConfigError, RunDirectoryError


def header(*norms: float, samples: float = 10.0, **other: float) -> Header:
    rows = [Row(samples=samples, loss_sum=5.0 * samples, change=n * n, **other) for n in norms]
    return Header(np.array([astuple(row) for row in rows]))


def warmed(mode: str = "drop", **arguments: float) -> Outliers:
    """After 20 rounds of norms around 1."""
    outliers = Outliers(mode, **arguments)  # type: ignore[arg-type]
    for round_ in range(20):
        seen = header(*(1 + 0.1 * math.sin(7 * round_ + rank) for rank in range(4)))
        outliers.judge(seen)
        assert seen.outliers == []
    return outliers


def test_the_averages_are_those_of_all_norms_without_a_bias() -> None:
    outliers, decay = Outliers(decay=0.75), 0.75
    norms = [(1.0, 3.0), (2.0, 2.5), (4.0, 1.0)]
    mean = variance = 0.0
    for round_, pair in enumerate(norms, start=1):
        outliers.judge(header(*pair))
        share = (1 - decay) / (1 - decay**round_)
        mean += share * (sum(pair) / 2 - mean)
        variance += share * (sum((n - mean) ** 2 for n in pair) / 2 - variance)
    state = outliers.state_dict()
    assert state == {"rounds": 3, "mean": pytest.approx(mean), "variance": pytest.approx(variance)}
    weights = np.array([decay**2, decay, 1])
    expected = (weights * [sum(pair) / 2 for pair in norms]).sum() / weights.sum()
    assert state["mean"] == pytest.approx(expected)


def test_an_outlier_has_no_weight_and_is_named() -> None:
    outliers = warmed()
    before = outliers.state_dict()
    seen = header(1.0, 1.1, 5.0, 0.9)
    outliers.judge(seen)
    assert seen.outliers == [2]
    assert seen.weights.tolist() == [10, 10, 0, 10]
    assert seen.shares.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert seen.loss == pytest.approx(5.0), "over the samples of the ranks that count"
    assert seen.outlier_words == (
        "the parameters of ranks [2] changed by 5 (2-norm), more than 3 standard deviations "
        f"({math.sqrt(before['variance']):.4g}) above the average of all ranks so far "
        f"({before['mean']:.4g}). Left out of the average."
    )
    assert outliers.state_dict()["mean"] < 1.05, "its norm does not count"


def test_weights_are_the_softmax_of_the_norms() -> None:
    outliers = warmed("weigh")
    seen = header(1.0, 1.1, 9.0, 0.9)
    outliers.judge(seen)
    expected = np.exp([-1.0, -1.1, -9.0, -0.9])
    assert seen.shares.tolist() == pytest.approx((expected / expected.sum()).tolist())
    assert seen.outliers == [2]
    assert seen.outlier_words.endswith("Weighted down in the average.")
    assert seen.loss == pytest.approx(5.0)
    huge = header(1e5, 1e5 + 1)
    Outliers("weigh").judge(huge)
    assert huge.shares.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


def test_where_most_ranks_change_more_the_training_has_changed() -> None:
    outliers = warmed()
    seen = header(5.0, 5.0, 5.0, 1.0)
    outliers.judge(seen)
    assert seen.outliers == []
    assert seen.weights.tolist() == [10] * 4
    assert outliers.state_dict()["mean"] > 1.1, "and the averages follow"
    half = header(9.0, 9.0, 1.0, 1.0)
    warmed().judge(half)
    assert half.outliers == [0, 1]


def test_no_rank_is_an_outlier_before_the_warm_up_ends() -> None:
    outliers = Outliers(warmup=5)
    for _ in range(5):
        seen = header(1.0, 1.0, 50.0)
        outliers.judge(seen)
        assert seen.outliers == []
    seen = header(1.0, 1.0, 500.0)
    outliers.judge(seen)
    assert seen.outliers == [2]


def test_a_rank_without_weight_is_not_looked_at() -> None:
    """Neither one that is not finite, nor one that is out of rows; and a round without weight is none."""
    outliers = warmed()
    rounds = outliers.state_dict()["rounds"]
    rows = [
        Row(samples=10, loss_sum=1, change=1.0),
        Row(samples=0, loss_sum=0, change=0.0),
        Row(samples=10, loss_sum=1, finite=0, change=math.nan),
        Row(samples=10, loss_sum=1, change=81.0),
    ]
    seen = Header(np.array([astuple(row) for row in rows]))
    outliers.judge(seen)
    assert seen.outliers == [3]
    assert seen.weights.tolist() == [10, 0, 0, 0]
    outliers.judge(header(1.0, 1.0, samples=0.0))
    assert outliers.state_dict()["rounds"] == rounds + 1


def test_off_changes_nothing() -> None:
    outliers = Outliers("off")
    outliers.load_state_dict({"rounds": 30, "mean": 1.0, "variance": 0.01})
    seen = header(1.0, 99.0)
    outliers.judge(seen)
    assert seen.weights.tolist() == [10, 10]
    assert outliers.state_dict() == {"rounds": 0, "mean": 0.0, "variance": 0.0}


def test_its_state_goes_on() -> None:
    whole = warmed()
    resumed = Outliers()
    resumed.load_state_dict(whole.state_dict())
    for outliers in (whole, resumed):
        outliers.judge(header(1.0, 1.2, 0.8))
    assert whole.state_dict() == resumed.state_dict()
    with pytest.raises(RunDirectoryError, match=r"missing required field"):
        resumed.load_state_dict({"rounds": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "all"}, r"outliers = 'all': expected 'off', 'drop' or 'weigh'"),
        ({"threshold": 0.0}, r"outlier_threshold = 0\.0: expected a positive number of standard deviations"),
        ({"decay": 1.0}, r"outlier_decay = 1\.0: expected a decay in \[0, 1\)"),
        ({"warmup": 0}, r"outlier_warmup = 0: expected at least 1 round"),
    ],
)
def test_values_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outliers(**arguments)  # type: ignore[arg-type]
