"""The schedule of a round's checks, and what a round leaves for the next header."""

from __future__ import annotations

import pytest

from hvd_train.algorithm.averaging import Inspection
from hvd_train.algorithm.header import Work
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.comm.solo import SoloCommunicator


class Recording:
    """An average that notes what it is asked for."""

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.verified: list[int] = []
        self.hashed: list[int] = []
        self.weights: list[float] = []

    def start(self) -> None:
        self.weights.append(-1.0)

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        now = len(self.weights) - 1
        if distance:
            self.measured.append(now)
        if verify:
            self.verified.append(now)
        return Inspection(
            finite=True,
            distance=4.0 if distance else -1.0,
            moved=1.0 if verify else -1.0,
            hash=7 if verify else None,
        )

    def moved(self) -> float:
        return 1.5

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> None:
        if verify:
            self.hashed.append(len(self.weights) - 1)
        assert healthy
        self.weights.append(weight)


def rounds(check_every: int, measure_drift: bool = True) -> tuple[Recording, list[float | None]]:
    """Eight rounds; and the drift that is known after each of them."""
    average = Recording()
    synchronizer = Synchronizer(
        average, SoloCommunicator(), check_every=check_every, measure_drift=measure_drift
    )
    synchronizer.start()
    drifts = []
    for i in range(8):
        header = synchronizer.synchronize(i, Work(samples=10 + i))
        assert header.samples == 10 + i
        drifts.append(synchronizer.drift)
    return average, drifts


@pytest.mark.parametrize(
    ("check_every", "hashed", "verified"),
    [(3, [0, 3, 6], [1, 4, 7]), (1, [*range(8)], [*range(8)]), (0, [], [])],
)
def test_a_check_is_taken_every_so_many_rounds_and_compared_one_later(
    check_every: int, hashed: list[int], verified: list[int]
) -> None:
    average, drifts = rounds(check_every)
    assert average.weights == [-1.0, *range(10, 18)]
    assert average.hashed == average.measured == hashed
    assert average.verified == verified
    # Of one rank: its distance from the anchor, less what the average moved.
    known = [i for i in verified if i - 1 in hashed]
    assert drifts == [3.0 if i in known else None for i in range(8)]


def test_your_own_loop_measures_no_drift() -> None:
    average, drifts = rounds(1, measure_drift=False)
    assert (average.measured, average.verified) == ([], [*range(8)])
    assert drifts == [None] * 8


def test_the_drift_may_be_known_in_its_own_round() -> None:
    synchronizer = Synchronizer(Recording(), SoloCommunicator(), check_every=3, drift_at_once=True)
    synchronizer.start()
    drifts = []
    for i in range(8):
        synchronizer.synchronize(i, Work(samples=0 if i == 3 else 1))
        drifts.append(synchronizer.drift)
    assert drifts == [2.5, None, None, None, None, None, 2.5, None], "in round 3 nothing was averaged"


def test_the_seconds_of_a_round_are_in_the_next_header() -> None:
    synchronizer = Synchronizer(Recording(), SoloCommunicator(), check_every=0)
    first = synchronizer.synchronize(0, Work(samples=1, data_s=2.0, compute_s=3.0))
    assert [first[f"{name}_s"][0] for name in ("data", "compute", "communication", "wait")] == [2, 3, 0, 0]
    assert synchronizer.communication_s > 0
    assert synchronizer.wait_s > 0
    synchronizer.communication_s += 5.0
    seconds = (synchronizer.communication_s, synchronizer.wait_s)
    second = synchronizer.synchronize(1, Work(samples=1), stop=True)
    assert (second["communication_s"][0], second["wait_s"][0]) == seconds
    assert (bool(first.stop), bool(second.stop)) == (False, True)
