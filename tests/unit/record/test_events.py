"""The event log against its schema, its order, its rate, and a writer that was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hvd_train.record.events import SCHEMA_FILE, EventLog, read_events
from hvd_train.record.reports import (
    CheckpointReport,
    FaultReport,
    LayerReport,
    MachineReport,
    NullRecorder,
    PeriodReport,
    Recorders,
    RoundReport,
    Spread,
)
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
CHECKPOINT = CheckpointReport(
    round=4, path="runs/first/checkpoints/round-4", reason="best", num_bytes=99, seconds=0.5
)
PERIOD = PeriodReport(round=5, period=20, message="it is longer")
FAULT = FaultReport(round=5, kind="not_finite", ranks=(1,), message="rank 1 was not finite")


class Clock:
    """Unix seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def events(path: Path) -> list[dict[str, Any]]:
    """All events, each checked against the schema; every line must be strict JSON."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    found = [
        json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()
    ]
    for event in found:
        VALIDATOR.validate(event)
    assert found == list(read_events(path))
    return found


def test_the_schema_is_a_schema_and_refuses_what_is_not_an_event() -> None:
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    good = {
        "event": "fault",
        "schema": 1,
        "time_s": 0.5,
        "round": 3,
        "kind": "x",
        "ranks": [1],
        "message": "m",
    }
    assert VALIDATOR.is_valid(good)
    assert VALIDATOR.is_valid({**good, "a_field_of_a_later_version": []})
    assert not VALIDATOR.is_valid({**good, "event": "dinner"})
    assert not VALIDATOR.is_valid({**good, "ranks": ["one"]})
    for name in good:
        assert not VALIDATOR.is_valid({k: v for k, v in good.items() if k != name})


def test_every_event_is_written_at_once_with_all_its_fields(path: Path) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    log.header(HEADER)
    for report in (round_report(4), evaluation(4, 0.5, 0.25, 2), CHECKPOINT, FAULT, PERIOD, STOP):
        clock.now += 1
        log.report(report)
    found = events(path)  # nothing waits for close()
    kinds = ["header", "round", "evaluation", "checkpoint", "fault", "period", "stop"]
    assert [e["event"] for e in found] == kinds
    assert [e["time_s"] - 1_700_000_000 for e in found] == [0, 1, 2, 3, 4, 5, 6]
    assert [e["round"] for e in found] == [0, 4, 4, 4, 5, 5, 60]
    assert {e["schema"] for e in found} == {2}
    assert found[0]["samples_per_rank"] == [717, 720]
    assert found[0]["lost_rank"] == "ends the job"
    assert found[1] == {
        "event": "round",
        "schema": 2,
        "time_s": clock.now - 5,
        "round": 4,
        "rounds": [4, 4],
        "epoch": 1.0,
        "samples": 640,
        "loss": 0.25,
        "period": 10,
        "lr": 0.05,
        "drift": None,
        "zero_weight": [],
        "slowest": None,
        "seconds": {
            "data": {"min": 0.25, "median": 0.5, "max": 1.0},
            "compute": {"min": 0.5, "median": 1.0, "max": 2.0},
            "communication": {"min": 0.25, "median": 0.375, "max": 0.5},
            "wait": {"min": 0.0, "median": 0.125, "max": 0.25},
        },
    }
    assert found[2]["metrics"] == {"error": 0.5, "loss": 0.5}
    assert found[3]["num_bytes"] == 99
    assert found[4]["ranks"] == [1]
    assert (found[5]["period"], found[5]["message"]) == (20, "it is longer")
    assert found[6]["checkpoints"]["best"] == "runs/first/checkpoints/round-30"
    log.close()
    log.close()


def test_rounds_of_a_tenth_of_a_second_share_a_line(path: Path) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    reports: list[RoundReport] = [round_report(1)]
    reports += [round_report(2, samples=100, loss=3.0, zero_weight=(3,), drift=0.5, lr=0.04)]
    reports += [round_report(3, samples=300, loss=1.0, zero_weight=(1,), period=7, lr=0.03)]
    reports += [
        round_report(4, samples=0, loss=math.nan, seconds={"compute": Spread(1.0, 1.0, 1.0)}, lr=0.02)
    ]
    for report in reports:
        log.report(report)
        clock.now += 0.03
    log.report(evaluation(4, 0.5, 0.5, 4))
    first, shared, look = events(path)
    assert (first["rounds"], look["event"]) == ([1, 1], "evaluation")
    assert (shared["rounds"], shared["round"], shared["epoch"]) == ([2, 4], 4, 1.0)
    assert (shared["samples"], shared["loss"]) == (400, 1.5)
    assert shared["seconds"]["compute"] == {"min": 2.0, "median": 3.0, "max": 5.0}
    assert shared["seconds"]["data"] == {"min": 0.5, "median": 1.0, "max": 2.0}
    assert (shared["period"], shared["lr"], shared["drift"], shared["zero_weight"]) == (10, 0.02, 0.5, [1, 3])
    assert shared["periods"] == [[10, 1], [7, 1], [10, 1]]
    assert "periods" not in first
    log.close()


def test_at_most_ten_round_lines_a_second_and_no_round_is_lost(path: Path) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    for number in range(1, 1001):
        log.report(round_report(number))
        clock.now += 0.002
    log.close()
    found = events(path)
    assert 15 <= len(found) <= 21
    covered = [number for e in found for number in range(e["rounds"][0], e["rounds"][1] + 1)]
    assert covered == list(range(1, 1001))
    assert sum(e["samples"] for e in found) == 640_000


def by_rank(*busy_s: float) -> np.ndarray:
    """Seconds of ranks that read for a tenth of the time, and wait for the one that is busy longest."""
    busy = np.array(busy_s)
    return np.stack([0.1 * busy, 0.9 * busy, np.full(len(busy), 0.01), busy.max() - busy])


def machine(number: int, ranks: int) -> MachineReport:
    return MachineReport(
        round=number,
        rss_bytes=[2_000_000_001] * ranks,
        cpu=[0.987654321] * ranks,
        throttled=[0.0] * ranks,
        available_bytes=[1 << 35],
        sent_bytes=None,
    )


def layers(number: int, count: int) -> LayerReport:
    return LayerReport(
        round=number,
        period=10,
        norm=[12.3456789] * count,
        update=[0.0123456789] * count,
        gradient={"min": [1e-5 / 3] * count, "mean": [math.nan] * count, "max": [1 / 3] * count},
        gradient_peak=[0.1] * count,
    )


def test_seconds_of_each_rank_are_added_up_and_the_slowest_is_named(path: Path) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    log.report(round_report(1, by_rank=by_rank(1.0, 2.0, 1.5)))
    for number in (2, 3, 4):
        clock.now += 0.04
        log.report(round_report(number, by_rank=by_rank(3.0, 1.0, number + 1.0)))
    clock.now += 0.02
    log.report(round_report(5, by_rank=by_rank(1.0, 1.0, 0.5)))
    log.close()
    found = events(path)
    assert [e["event"] for e in found] == ["round", "ranks"] * 3
    assert [e["rounds"] for e in found] == [[1, 1], [1, 1], [2, 4], [2, 4], [5, 5], [5, 5]]
    assert [e["slowest"] for e in found[::2]] == [1, 2, 0]
    assert found[3]["seconds"] == {
        "data": [0.9, 0.3, 1.2],
        "compute": [8.1, 2.7, 10.8],
        "communication": [0.03] * 3,
        "wait": [3.0, 9.0, 0.0],
    }


def test_a_rank_that_has_no_other_is_not_slow(path: Path) -> None:
    log = EventLog(path)
    log.report(round_report(1, by_rank=by_rank(1.0)))
    assert events(path)[0]["slowest"] is None
    log.close()


def test_observations_are_written_in_the_order_of_ranks_hosts_and_layers(path: Path) -> None:
    log = EventLog(path)
    log.report(machine(1, ranks=2))
    log.report(layers(1, 3))
    log.close()
    first, second = events(path)
    assert (first["event"], first["rss_bytes"], first["cpu"]) == (
        "machine",
        [2_000_000_001] * 2,
        [0.9877] * 2,
    )
    assert (second["event"], second["norm"]) == ("layers", [12.35] * 3)
    assert second["gradient"]["mean"] == [None] * 3


@pytest.mark.parametrize("ranks", [2, 64, 1024])
def test_an_hour_of_the_log_stays_below_five_megabytes(path: Path, ranks: int) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    busy = by_rank(*np.random.default_rng(0).random(ranks))
    for second in range(3600):
        for number in range(4 * second + 1, 4 * second + 5):
            clock.now += 0.25
            log.report(round_report(number, by_rank=busy))
        log.report(machine(number, ranks))
        log.report(layers(number, 300))
    log.close()
    assert 2_000_000 < path.stat().st_size < 5_000_000
    lines: dict[str, list[dict[str, Any]]] = {}
    for event in read_events(path):
        lines.setdefault(event["event"], []).append(event)
    for first, *_ in lines.values():
        VALIDATOR.validate(first)
    for event in ("round", "ranks"):
        covered = [n for e in lines[event] for n in range(e["rounds"][0], e["rounds"][1] + 1)]
        assert covered == list(range(1, 14_401)), "no round is lost"
    compute = np.sum([e["seconds"]["compute"] for e in lines["ranks"]], axis=0)
    np.testing.assert_allclose(compute, 14_400 * busy[1], rtol=1e-3)
    assert len(lines["round"]) > 2500
    assert len(lines["ranks"]) > 60
    assert len(lines["machine"]) > 10
    assert len(lines["layers"]) > 20


def test_a_clock_that_is_set_back_holds_nothing_back(path: Path) -> None:
    clock = Clock()
    log = EventLog(path, clock)
    log.report(round_report(1))
    clock.now -= 3600
    log.report(round_report(2))
    assert [e["rounds"] for e in events(path)] == [[1, 1], [2, 2]]
    log.close()


def test_values_that_are_not_finite_are_null_and_numpy_scalars_are_numbers(path: Path) -> None:
    log = EventLog(path)
    log.report(round_report(1, loss=math.inf, samples=np.int64(640), lr=np.float32(0.5)))
    log.report(evaluation(1, math.nan, math.nan, 1))
    log.close()
    line, look = events(path)
    assert (line["loss"], line["samples"], line["lr"]) == (None, 640, 0.5)
    assert (look["error"], look["metrics"]["error"]) == (None, None)


@pytest.mark.parametrize("cut", [1, 2, 17, 10**9])
def test_a_torn_last_line_is_ignored_and_a_resumed_log_is_whole(path: Path, cut: int) -> None:
    log = EventLog(path)
    log.header(HEADER)
    log.report(round_report(1))
    log.close()
    whole = events(path)
    log = EventLog(path)
    log.report(STOP)
    log.close()
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    os.truncate(path, path.stat().st_size - min(cut, last - 1))

    assert list(read_events(path)) == whole
    again = EventLog(path)
    again.header(HEADER)
    again.close()
    assert [e["event"] for e in events(path)] == ["header", "round", "header"]


def test_a_torn_line_longer_than_a_block_and_a_log_of_one_torn_line(path: Path) -> None:
    path.write_bytes(b'{"event": "fault", "message": "' + b"x" * 200_000)
    EventLog(path).close()
    assert path.read_bytes() == b""
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    EventLog(path).close()
    assert path.read_bytes() == b"{}\n"


def test_a_damaged_line_in_the_middle_is_named(path: Path) -> None:
    path.write_text('{"event": "stop"}\n{"event": \n{"event": "stop"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2: not an event: "):
        list(read_events(path))


WRITER = """
import sys
from hvd_train.record.events import EventLog
from tests.unit.run_reports import HEADER, evaluation
log = EventLog(sys.argv[1])
log.header(HEADER)
number = 0
while True:
    number += 1
    log.report(evaluation(number, 0.5, 0.5, number))
    if number == 200:
        print("200", flush=True)
"""


def test_a_killed_writer_leaves_every_event_that_it_reported(path: Path) -> None:
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"200\n"
        writer.send_signal(signal.SIGKILL)
    rounds = [e["round"] for e in read_events(path)][1:]
    assert len(rounds) >= 200
    assert rounds == list(range(1, len(rounds) + 1))


def test_other_ranks_record_nothing_and_several_recorders_get_everything(path: Path, tmp_path: Path) -> None:
    both = Recorders(EventLog(path), NullRecorder(), EventLog(tmp_path / "copy.jsonl"))
    both.header(HEADER)
    both.report(STOP)
    both.close()
    assert [e["event"] for e in events(path)] == ["header", "stop"]
    assert [e["event"] for e in events(tmp_path / "copy.jsonl")] == ["header", "stop"]
