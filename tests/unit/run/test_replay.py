"""The periods of a run are read from its event log, and a log that does not have them all is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hvd_train.errors import ConfigError
from hvd_train.record.events import EventLog, read_events
from hvd_train.run.replay import periods_of
from tests.unit.run_reports import HEADER, evaluation, round_report


def header(rounds: int = 0, period: int | None = 10) -> dict[str, Any]:
    return {"event": "header", "round": rounds, "period": period}


def line(first: int, last: int, period: int, *periods: tuple[int, int]) -> dict[str, Any]:
    event = {"event": "round", "round": last, "rounds": [first, last], "period": period}
    return {**event, "periods": periods} if periods else event


def steps(first: int, *counts: Sequence[int]) -> dict[str, Any]:
    """A line of the schedule `time`."""
    return {**line(first, first + len(counts) - 1, 1), "steps": counts}


def write(folder: Path, *events: Any) -> str:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def test_stretches_of_rounds_with_one_period(tmp_path: Path) -> None:
    other = {"event": "evaluation", "round": 3}
    run = write(
        tmp_path, header(), line(1, 1, 5), line(2, 3, 5), other, line(4, 9, 7, (5, 2), (1, 3), (7, 1))
    )
    assert periods_of(run, 1) == ((5, 5), (8, 1), (9, 7))
    assert periods_of(f"{run}/checkpoints/round-3", 1) == ((5, 5), (8, 1), (9, 7)), (
        "a checkpoint is of its run"
    )


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(6, ((4, 5), (6, 3), (8, 2))), (5, ((4, 5), (5, 3), (8, 2))), (4, ((4, 5), (8, 2))), (0, ((8, 2),))],
)
def test_rounds_that_a_resume_has_undone_do_not_count(
    rounds: int, expected: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    run = write(tmp_path, header(), line(1, 4, 5), line(5, 6, 3), header(rounds), line(rounds + 1, 8, 2))
    assert periods_of(run, 1) == expected


def test_every_period_is_in_the_log_however_many_rounds_a_line_has(tmp_path: Path) -> None:
    log = EventLog(
        tmp_path / "events.jsonl", lambda: 1_700_000_000.0
    )  # no time passes: the rounds are joined
    log.header(HEADER)
    periods = [10, 10, 3, 3, 3, 7, 10, 10]
    for number, k in enumerate(periods, 1):
        log.report(round_report(number, period=k))
        if number in (1, 5):
            log.report(evaluation(number, 0.5, 0.5, 1))
    log.close()
    assert periods_of(str(tmp_path), 1) == ((2, 10), (5, 3), (6, 7), (8, 10))


def test_local_steps_of_each_rank(tmp_path: Path) -> None:
    lines = (steps(1, (5, 2), (5, 2), (6, 0)), steps(4, (5, 5)), header(3), steps(4, (4, 4)))
    assert periods_of(write(tmp_path, header(), *lines), 2) == ((2, (5, 2)), (3, (6, 0)), (4, (4, 4)))


def test_the_steps_of_every_round_are_in_the_log(tmp_path: Path) -> None:
    """Of 300 ranks, for an hour: more than all other lines of rounds may take."""
    now = 1_700_000_000.0
    log = EventLog(tmp_path / "events.jsonl", lambda: now)
    log.header(HEADER)
    counts = [[number % 7 + rank % 5 for rank in range(300)] for number in range(1800)]
    for number, of_ranks in enumerate(counts, 1):
        log.report(round_report(number, period=of_ranks[0] + 1, steps=of_ranks))
        now += 2.0
    held = sum(len(event.get("steps", ())) for event in read_events(tmp_path / "events.jsonl"))
    assert held > 1700, "few are lost if the program is killed"
    log.close()
    found = periods_of(str(tmp_path), 300)
    assert [k for _, k in found] == [tuple(of_ranks) for of_ranks in counts]
    assert not any("periods" in event for event in read_events(tmp_path / "events.jsonl"))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([header()], "/events.jsonl has no round; expected a run that has averaged at least once."),
        (
            [header(), line(1, 2, 5), line(4, 4, 5)],
            "/events.jsonl goes from round 2 to a line of rounds 4 to 4; expected every round from 1 on. "
            "Give a run whose log is whole and begins with its first round.",
        ),
        ([header(12), line(13, 13, 5)], "goes from round 0 to a line of rounds 13 to 13"),
        ([header(), line(1, 3, 5, (5, 1), (4, 1))], "goes from round 0 to a line of rounds 1 to 3"),
        (
            [header(period=None), line(1, 1, 5)],
            "is of a run with sync.mode = 'none', which was never averaged. Give one that was.",
        ),
        (
            [header(), line(1, 1, 0)],
            "cannot be read: Expected `int` >= 1 - at `$.period`. Give a run whose log",
        ),
        ([header(), "{"], "cannot be read: "),
        (
            [header(), steps(1, (5, 2, 3))],
            " has the local steps of each of 3 ranks (sync.schedule = 'time'); expected 1, the ranks of this "
            "job. Start as many ranks.",
        ),
        (
            [header(), line(1, 3, 5), steps(4, (5,))],
            " is of a run that changed from or to sync.schedule = 'time', where every rank passes epochs of "
            "its own; expected one or the other in all rounds.",
        ),
        ([header(), steps(1, (5,), (-1,))], "cannot be read: Expected `int` >= 0 - at `$.steps[1][0]"),
    ],
)
def test_a_log_without_every_round_is_refused(events: list[Any], message: str, tmp_path: Path) -> None:
    run = write(tmp_path, *events)
    with pytest.raises(ConfigError) as caught:
        periods_of(run, 1)
    assert str(caught.value).startswith(f"sync.replay_periods: {tmp_path}/events.jsonl")
    assert message in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        periods_of(f"{tmp_path}/none", 1)
    assert str(caught.value) == (
        f"sync.replay_periods = '{tmp_path}/none': there is no {tmp_path}/none/events.jsonl; expected the "
        "folder of a run."
    )
