"""The header of a round: weights, health, hashes and spreads from the rows of all ranks."""

from __future__ import annotations

import math
from dataclasses import astuple, fields

import numpy as np
import pytest

from hvd_train.algorithm.header import Header, Row, exchange
from tests.threads import on_ranks


def header(*rows: Row) -> Header:
    return Header(np.array([astuple(row) for row in rows]))


def test_every_rank_gets_the_rows_of_all() -> None:
    def run(comm):  # type: ignore[no-untyped-def]
        values = {f.name: float(10 * i + comm.rank) for i, f in enumerate(fields(Row))}
        return exchange(comm, Row(**values))

    for seen in on_ranks(3, run):
        assert seen.size == 3
        for i, f in enumerate(fields(Row)):
            assert seen[f.name].tolist() == [10.0 * i, 10.0 * i + 1, 10.0 * i + 2]


def test_weights_are_the_samples_and_shares_their_part() -> None:
    seen = header(Row(samples=30, loss_sum=6), Row(samples=10, loss_sum=4), Row(samples=0, loss_sum=0))
    assert seen.weights.tolist() == [30, 10, 0]
    assert seen.shares.tolist() == [0.75, 0.25, 0]
    assert seen.samples == 40
    assert seen.loss == 0.25
    assert seen.unhealthy == []


@pytest.mark.parametrize(
    "bad",
    [
        Row(samples=5, loss_sum=1, finite=0),
        Row(samples=5, loss_sum=math.nan),
        Row(samples=5, loss_sum=math.inf),
    ],
)
def test_a_rank_that_is_not_finite_has_no_weight(bad: Row) -> None:
    seen = header(Row(samples=10, loss_sum=20), bad)
    assert seen.unhealthy == [1]
    assert seen.weights.tolist() == [10, 0]
    assert seen.shares.tolist() == [1, 0]
    assert seen.loss == 2
    assert seen.samples == 15, "what was used was used"


def test_a_round_without_any_sample_has_no_loss() -> None:
    seen = header(Row(samples=0, loss_sum=0), Row(samples=0, loss_sum=0))
    assert seen.loss is None
    assert seen.shares.tolist() == [0, 0]
    assert seen.unhealthy == []
    everywhere = header(Row(samples=3, loss_sum=math.nan), Row(samples=3, loss_sum=1, finite=0))
    assert everywhere.unhealthy == [0, 1]
    assert everywhere.loss is None


def test_one_rank_that_was_asked_to_stop_is_enough() -> None:
    assert not header(Row(samples=1, loss_sum=0), Row(samples=1, loss_sum=0)).stop
    assert header(Row(samples=1, loss_sum=0), Row(samples=1, loss_sum=0, stop=1)).stop


def test_hashes_are_compared_in_both_halves() -> None:
    def row(high: int, low: int) -> Row:
        return Row(samples=1, loss_sum=0, moved=0, hash_high=high, hash_low=low)

    largest = 2**32 - 1
    assert header(row(largest, largest), row(largest, largest)).unlike() == []
    assert header(row(7, largest), row(7, largest - 1), row(8, largest)).unlike() == [1, 2]
    assert header(Row(samples=1, loss_sum=0), Row(samples=1, loss_sum=0)).unlike() == []


def test_measured_and_verified_need_every_rank() -> None:
    one, other = Row(samples=1, loss_sum=0, distance=0), Row(samples=1, loss_sum=0, moved=0)
    assert header(one, one).measured
    assert not header(one, other).measured
    assert header(other, other).verified
    assert not header(one, other).verified
    sick = Row(samples=1, loss_sum=0, distance=math.nan, finite=0)
    assert not header(one, sick).measured


def test_spread() -> None:
    rows = [Row(samples=1, loss_sum=0, data_s=s) for s in (3.0, 1.0, 2.5, 2.0)]
    assert header(*rows).spread("data_s") == (1.0, 2.25, 3.0)
