"""How many local steps fit into a round, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from hvd_train.algorithm import pace
from hvd_train.algorithm.pace import Pace
from hvd_train.algorithm.period.base import Seconds

Run = Callable[[int | Seconds, Sequence[float]], int]


@pytest.fixture
def steps_of(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A round of steps that last so long; returns how many were taken."""
    now = 0.0
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
    made = Pace()

    def run(limit: int | Seconds, durations: Sequence[float]) -> int:
        nonlocal now
        made.begin(limit)
        for duration in durations:
            if made.is_over():
                break
            now += duration
            made.count()
        assert made.is_over()
        now += 1.0  # the average
        return made.steps

    return run


def test_a_number_of_steps(steps_of: Run) -> None:
    assert steps_of(3, [1.0] * 9) == 3
    assert steps_of(0, [1.0] * 9) == 0


def test_as_many_as_fit(steps_of: Run) -> None:
    assert steps_of(Seconds(1.0), [0.125] * 20) == 8
    assert steps_of(Seconds(0.99), [0.125] * 20) == 7
    assert steps_of(Seconds(1.0), [0.0625] * 4 + [0.125] * 20) == 10


def test_at_least_one(steps_of: Run) -> None:
    assert [steps_of(Seconds(1.0), [4.0] * 9) for _ in range(2)] == [1, 1]


def test_one_slow_step_is_no_measure(steps_of: Run) -> None:
    """The median of nine is what the next step is judged by, over the ends of rounds."""
    assert steps_of(Seconds(1.0), [0.125] * 4 + [0.375] + [0.125] * 20) == 6
    assert steps_of(Seconds(1.0), [0.5] * 20) == 2, "the second was expected to be short, the third was not"
