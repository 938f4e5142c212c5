"""The periods that each schedule gives, its state, and what it says."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest

from hvd_train.algorithm.header import Header, Row
from hvd_train.algorithm.period.adacomm import AdaCommPeriod
from hvd_train.algorithm.period.auto import AutoPeriod
from hvd_train.algorithm.period.base import Done, Period, Seconds, own_limit
from hvd_train.algorithm.period.chosen import make_period
from hvd_train.algorithm.period.drift import DriftPeriod
from hvd_train.algorithm.period.given import FixedPeriod, QsrPeriod, WarmupPeriod
from hvd_train.algorithm.period.replayed import ReplayedPeriods
from hvd_train.algorithm.period.timed import TimePeriod
from hvd_train.config import SyncConfig
from hvd_train.errors import RunDirectoryError


def header(*rows: dict[str, float]) -> Header:
    return Header(np.array([astuple(Row(**{"samples": 1, "loss_sum": 0.0, **row})) for row in rows]))


def done(k: int, rounds: int = 1, drift: float | None = None, **row: float) -> Done:
    return Done(rounds=rounds, k=k, header=header(row), drift=drift)


def again(period: Any, other: Any) -> Any:
    """`other` with the state of `period`, as JSON holds it."""
    other.load_state_dict(json.loads(json.dumps(period.state_dict())))
    return other


def test_fixed() -> None:
    period = again(FixedPeriod(3), FixedPeriod(7))
    assert [period.next(r, 0.1) for r in (0, 1, 1, 10**6)] == [7, 7, 7, 7]
    assert period.words == ""


def every_step(share: float, rounds: int, period: FixedPeriod) -> list[str]:
    """What is said in rounds of one second that spend this share on averages, and on waiting for others."""
    row = {"data_s": 0.1, "compute_s": 0.9 - share, "communication_s": 0.7 * share, "wait_s": 0.3 * share}
    waiting = {"compute_s": 0.05, "wait_s": 0.95}
    return [
        period.after_round(Done(rounds=r, k=1, header=header(row, waiting))) for r in range(1, rounds + 1)
    ]


def test_fixed_says_once_that_averages_after_every_step_take_most_of_the_time() -> None:
    """Over 20 rounds, the first of a start left out, on the rank that waits least."""
    said = every_step(0.6, 60, FixedPeriod(1))
    assert [r for r, text in enumerate(said, 1) if text] == [21]
    assert said[20] == (
        "communication took 60% of the time in 20 rounds of one local step each: choose a longer period "
        "(sync.period), or the schedule auto (sync.schedule)."
    )
    assert not any(every_step(0.45, 60, FixedPeriod(1)))
    assert not any(every_step(0.8, 60, FixedPeriod(2)))
    assert not any(every_step(0.8, 60, FixedPeriod(1, averages=False)))
    alone = header({"communication_s": 0.8, "compute_s": 0.2})
    period = FixedPeriod(1)
    assert not any(period.after_round(Done(rounds=r, k=1, header=alone)) for r in range(60))
    assert period.after_round(done(7)) == ""


def test_warmup() -> None:
    period = WarmupPeriod(10, rounds=3)
    assert [period.next(r, 0.1) for r in range(6)] == [1, 1, 1, 10, 10, 10]
    assert period.words == "average after every local step in the first 3 rounds, then every 10 local steps"
    assert WarmupPeriod(1, rounds=1).words.endswith("in the first round, then every 1 local step")
    words = make_period(SyncConfig(schedule="warmup", warmup_rounds=3, period=4)).words
    assert words == (
        "average gradients in every local step of the first 3 rounds, then parameters every 4 local steps"
    )


@pytest.mark.parametrize(
    ("rate", "k"),
    [
        (0.8, 4),  # 0.0625, below the base
        (0.1, 4),  # exactly 4
        (0.09, 4),  # 4.9
        (0.08, 6),  # 6.25
        (0.2 / 3, 9),  # the quotient is 2.9999999999999996
        (0.02, 48),  # 100, above the largest
        (1e-200, 48),
        (0.0, 48),
    ],
)
def test_qsr(rate: float, k: int) -> None:
    assert QsrPeriod(4, alpha=0.2, most=48).next(0, rate) == k


def test_adacomm() -> None:
    """tau_0 = 10, intervals of 20 local steps; the losses are means over the samples of an interval."""
    period = AdaCommPeriod(10, steps=20, most=48)
    assert period.next(0, 0.1) == 10
    assert period.after_round(done(10, samples=100, loss_sum=400.0)) == ""  # F(x_0) = 4
    assert period.next(1, 0.1) == 10
    period.after_round(done(10, samples=300, loss_sum=432.0))
    # (400 + 432) / 400 = 2.08: ceil(10 sqrt(0.52)) = ceil(7.2)
    assert [period.next(2, 0.1), period.next(2, 0.1)] == [8, 8]
    for rounds in (2, 3):
        period.after_round(done(8, rounds, samples=80, loss_sum=200.0))
        assert period.next(rounds + 1, 0.1) == 8, "16 of 20 steps"
    period.after_round(done(8, samples=80, loss_sum=200.0))
    # 2.5 is no progress: gamma = 1/2
    assert period.next(5, 0.1) == 4
    for _ in range(5):
        period.after_round(done(4, samples=40, loss_sum=100.0))
    # The same loss at a quarter of the rate: ceil(10 sqrt(2.5 / 4 * 4)) = ceil(15.8)
    assert period.next(10, 0.025) == 16
    period.after_round(done(20, samples=40, loss_sum=1e-6))
    assert period.next(11, 0.025) == 1
    period.after_round(done(20, samples=40, loss_sum=160.0))
    assert period.next(12, 0.025) == 1, "20 is not below 1, and half of 1 is 1"
    period.after_round(done(20, samples=40, loss_sum=160.0))
    assert period.next(13, 1e-9) == 48
    period.after_round(done(20, samples=40, loss_sum=160.0))
    assert period.next(14, 0.0) == 48


def test_adacomm_goes_on_within_an_interval() -> None:
    whole, parts = AdaCommPeriod(9, steps=20, most=48), AdaCommPeriod(9, steps=20, most=48)
    found: list[list[int]] = [[], []]
    for rounds in range(30):
        for period, ks in ((whole, found[0]), (parts, found[1])):
            k = period.next(rounds, 0.1 / (1 + rounds // 12))
            period.after_round(done(k, rounds + 1, samples=7, loss_sum=7 / (1 + rounds) ** 0.3))
            ks.append(k)
        parts = again(parts, AdaCommPeriod(9, steps=20, most=48))
    assert found[0] == found[1]
    assert len(set(found[0])) > 3
    within = AdaCommPeriod(9, steps=20, most=48)
    within.next(0, 0.1)
    within.after_round(done(9, samples=7, loss_sum=7.0))
    assert again(within, AdaCommPeriod(20, steps=20, most=48)).next(1, 0.1) == 20, "another base"
    assert again(AdaCommPeriod(40, steps=20, most=48), AdaCommPeriod(40, steps=20, most=40)).next(0, 1) == 40


def test_adacomm_needs_a_positive_loss() -> None:
    period = AdaCommPeriod(10, steps=10, most=48)
    period.next(0, 0.1)
    assert period.after_round(done(10, 1, samples=4, loss_sum=-2.0)) == (
        "the training loss of round 1 is -0.5, and sync.schedule = 'adacomm' needs a positive one: every "
        "round has 10 local steps."
    )
    assert period.next(1, 0.1) == 10
    assert period.after_round(done(10, 2, samples=4, loss_sum=-4.0)) == ""
    unhealthy = AdaCommPeriod(10, steps=10, most=48)
    unhealthy.next(0, 0.1)
    assert unhealthy.after_round(done(10, 1, samples=4, loss_sum=math.nan)) == ""
    assert unhealthy.next(1, 0.1) == 10, "no loss, no change"
    unhealthy.after_round(done(10, 2, samples=4, loss_sum=4.0))
    assert unhealthy.next(2, 0.1) == 5, "the first loss counts, and it did not fall"


@pytest.mark.parametrize(
    ("k", "drift", "following"),
    [
        (10, 4.0, 10),
        (10, 3.9, 10),  # 10.1
        (10, 3.0, 11),  # 11.5
        (10, 1.0, 20),
        (10, 0.0, 20),  # at most twice as many
        (30, 0.1, 48),
        (10, 4.1, 9),
        (10, 16.0, 5),
        (1, 1e9, 1),
    ],
)
def test_drift(k: int, drift: float, following: int) -> None:
    period = DriftPeriod(k, bound=4.0, most=48)
    assert period.after_round(done(k)) == ""
    assert period.next(1, 0.1) == k, "it was not measured"
    period.after_round(done(k, drift=drift))
    assert period.next(2, 0.1) == following
    assert again(period, DriftPeriod(k, bound=4.0, most=48)).next(2, 0.1) == following
    assert again(period, DriftPeriod(k + 1, bound=4.0, most=48)).next(2, 0.1) == k + 1


def rounds_of(period: AutoPeriod, count: int, communication_s: float, step_s: float) -> list[str]:
    """What it says in so many rounds of two ranks, of which one is twice as fast as the other."""
    said = []
    for i in range(count):
        k = period.next(i, 0.1)
        slow, fast = k * step_s, k * step_s / 2
        # The last hundredth of a second is what the header's message takes.
        rows = (
            {"compute_s": slow, "communication_s": communication_s - 0.01, "wait_s": 0.01},
            {"compute_s": fast, "communication_s": communication_s - 0.01, "wait_s": 0.01 + slow - fast},
        )
        said.append(period.after_round(Done(rounds=i + 1, k=k, header=header(*rows))))
    return said


def test_auto_reaches_its_share_and_settles() -> None:
    period = AutoPeriod(10, share=0.2, most=48)
    # 0.5 / (0.5 + k 0.1) <= 0.2 from k = 20 on.
    said = rounds_of(period, 11, 0.5, 0.1)
    assert said[:10] == [""] * 10
    assert said[10] == (
        "communication took 33.3% of the time with 10 local steps, and sync.target_share is 0.2: every round "
        "has 20 from round 12 on."
    )
    assert period.next(11, 0.1) == 20
    for communication_s in (0.51, 0.49, 0.5, 0.52):
        assert not any(rounds_of(period, 11, communication_s, 0.1))
    assert any(rounds_of(period, 80, 0.25, 0.1))
    assert period.next(0, 0.1) == 10
    assert any(rounds_of(period, 80, 0.012, 0.1))
    assert period.next(0, 0.1) == 1
    assert not any(rounds_of(period, 31, 0.012, 0.1))


def test_auto_measures_more_rounds_where_it_hardly_changes() -> None:
    """Its first change is a large one. The next ones are of less than a quarter: after 20 rounds, then 40."""
    period, changes = AutoPeriod(10, share=0.2, most=48), []
    for number, communication_s in enumerate([0.5] * 11 + [0.549] * 11 + [0.599] * 21 + [0.52] * 41, 1):
        if any(rounds_of(period, 1, communication_s, 0.1)):
            changes.append((number, period.next(0, 0.1)))
    assert changes == [(11, 20), (22, 22), (43, 24), (84, 21)]


def test_auto_leaves_out_single_slow_rounds() -> None:
    period = AutoPeriod(20, share=0.2, most=48)
    for i in range(41):
        assert not any(rounds_of(period, 1, 50.0 if i % 10 in (0, 3, 7) else 0.5, 0.1))


def test_auto_says_once_that_the_largest_period_does_not_do() -> None:
    period = AutoPeriod(10, share=0.05, most=48)
    (line,) = filter(None, rounds_of(period, 60, 1.0, 0.1))
    assert line == (
        "communication took 50.0% of the time with 10 local steps, and sync.target_share is 0.05: every "
        "round has 48 from round 12 on; with sync.max_period = 48 communication takes about 17.2% of the "
        "time, more than sync.target_share = 0.05. Raise sync.max_period, or send less (sync.wire)."
    )
    assert again(period, AutoPeriod(10, share=0.05, most=48)).next(0, 0.1) == 48
    assert again(period, AutoPeriod(10, share=0.05, most=30)).next(0, 0.1) == 30
    assert again(period, AutoPeriod(11, share=0.05, most=48)).next(0, 0.1) == 11


def test_auto_measures_nothing_without_time() -> None:
    period = AutoPeriod(10, share=0.05, most=48)
    assert not any(rounds_of(period, 30, 1.0, 0.0))
    assert period.next(0, 0.1) == 10


def timed(rounds: int, *rows: tuple[int, float]) -> Done:
    """Ranks with so many steps in so many seconds."""
    table = header(*({"steps": steps, "compute_s": seconds} for steps, seconds in rows))
    return Done(rounds=rounds, k=table.period, header=table)


def test_time() -> None:
    period = again(TimePeriod(2.0, most=48), TimePeriod(0.5, most=48))
    assert period.next(0, 0.1) == period.next(9, 0.1) == Seconds(0.5)
    assert period.words == "average after as many local steps of each rank as fit into 0.5 s"
    assert timed(1, (20, 0.5), (11, 0.5)).k == 16, "their mean"
    assert timed(1, (0, 0.0)).k == 1
    with pytest.raises(ValueError, match="seconds = 0: expected more than 0"):
        TimePeriod(0)


def test_time_says_once_which_ranks_are_too_slow() -> None:
    """In three rounds in a row, the first of a start left out."""
    period = TimePeriod(0.5, most=48)
    slow, fits = ((1, 2.25), (1, 2.0), (1, 0.7)), ((1, 2.25), (2, 0.5), (1, 0.5))
    assert [period.after_round(timed(r, *slow)) for r in (1, 2, 3)] == ["", "", ""]
    assert [period.after_round(timed(r, *fits)) for r in (4, 5)] == [
        "one local step took 2.25 s on rank 0, and sync.seconds is 0.5: the others wait for it. Raise "
        "sync.seconds.",
        "",
    ]
    period = TimePeriod(0.5)
    said = [period.after_round(timed(r, *slow)) for r in range(8)]
    assert [bool(text) for text in said] == [False, False, False, True, False, False, False, False]
    assert "took 2.25 s on ranks 0, 1, and" in said[3]
    period = TimePeriod(0.5)  # counts anew where a rank was lost
    said = [period.after_round(timed(r, *(slow if r < 3 else slow[1:]))) for r in range(6)]
    assert [bool(text) for text in said] == [False] * 5 + [True]


def test_time_says_once_that_rounds_are_very_long() -> None:
    period, long = TimePeriod(0.5, most=48), ((48, 0.5), (49, 0.5))
    assert [period.after_round(timed(r, *long)) for r in range(3)] == [
        "",
        "rank 1 took 49 local steps: above 48 plain averaging tends to lose accuracy. Lower sync.seconds, or "
        "set sync.outer = 'nesterov'.",
        "",
    ]
    assert not any(TimePeriod(0.5).after_round(timed(r, *long)) for r in range(3))


def test_replayed() -> None:
    period = ReplayedPeriods("runs/a", [(3, 5), (4, 1), (9, 7)], "auto")
    assert [period.next(r, 0.1) for r in range(12)] == [5, 5, 5, 1, 7, 7, 7, 7, 7, 7, 7, 7]
    assert period.words == "average when runs/a did, in place of sync.schedule = 'auto'"
    assert [period.after_round(done(7, r)) for r in (1, 9, 11)] == ["", "", ""]
    assert period.after_round(done(7, 10)) == (
        "runs/a ends with round 9: this one and those after it have as many local steps, 7."
    )


def test_replayed_steps_of_each_rank() -> None:
    period = ReplayedPeriods("runs/a", [(1, (5, 3)), (3, (6, 2))])
    assert [period.next(r, 0.1) for r in range(4)] == [(5, 3), (6, 2), (6, 2), (6, 2)]
    assert [own_limit(period.next(0, 0.1), rank) for rank in range(2)] == [5, 3]
    assert period.after_round(done(4, 4)).endswith("have as many local steps, 2-6.")


@pytest.mark.parametrize(
    "sync",
    [
        SyncConfig(period=4),
        SyncConfig(period=4, schedule="warmup", warmup_rounds=9),
        SyncConfig(period=4, schedule="qsr", qsr_alpha=0.1),
        SyncConfig(period=4, schedule="adacomm"),
        SyncConfig(period=4, schedule="drift", drift_bound=1.0),
        SyncConfig(period=4, schedule="auto"),
    ],
    ids=lambda sync: sync.schedule,
)
def test_a_configuration_names_its_schedule(sync: SyncConfig) -> None:
    period: Period = make_period(sync)
    assert type(period).__name__.lower().removesuffix("period") == sync.schedule
    assert period.next(20, 0.1) == 4
    assert bool(period.words) is (sync.schedule != "fixed")
    replayed = make_period(sync, [(3, 5)])
    assert isinstance(replayed, ReplayedPeriods)
    for any_period in (period, replayed):
        with pytest.raises(RunDirectoryError, match="unknown field `more`"):
            any_period.load_state_dict({**any_period.state_dict(), "more": 1})
