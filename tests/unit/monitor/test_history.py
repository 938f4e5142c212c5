"""What a history makes of a log: resumes, damage of every kind, later versions, and very long logs."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvd_train.monitor import history as module
from hvd_train.monitor.events import Round
from hvd_train.monitor.history import History
from tests.unit.monitor.logs import LAYERS, Log, whole
from tests.unit.monitor.logs import history_of as read

SETTINGS = settings(
    # The same examples in every run; HYPOTHESIS_EXAMPLES=10000 looks for so many others.
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")),
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_a_whole_log_is_read_without_the_rounds_that_were_undone(tmp_path: Path) -> None:
    history = read(whole(tmp_path))
    assert history.problems == []
    assert [start.round for start in history.starts] == [0, 20]
    assert history.undone == 10
    assert [r.round for r in history.rounds] == list(range(1, 61))
    assert [e.round for e in history.evaluations] == [20, 60]
    assert history.faults == []
    assert [c.round for c in history.checkpoints] == [20]
    covered = [n for e in history.ranks for n in range(e.rounds[0], e.rounds[1] + 1)]
    assert covered == list(range(1, 61))
    assert [e.round for e in history.layers] == [20, 60]
    assert history.stop is not None
    assert history.last is history.stop
    start = history.start
    assert start is not None
    assert (start.host_of_rank, start.layers) == ([0, 0, 1, 1], list(LAYERS))
    np.testing.assert_allclose(history.ranks[-1].seconds["compute"], [0.45, 0.45, 0.9, 0.45])
    np.testing.assert_allclose(history.layers[-1].update, [0.1, 1e-9, 0.1])


def test_a_growing_log_gives_what_the_whole_one_gives(tmp_path: Path) -> None:
    content = whole(tmp_path / "whole").read_bytes()
    path = tmp_path / "events.jsonl"
    path.touch()
    history, step = History(path), random.Random(0)
    written = 0
    while written < len(content):
        size = step.randrange(1, 3000)
        with open(path, "ab") as file:
            file.write(content[written : written + size])
        written += size
        history.update()
    expected = read(tmp_path / "whole/events.jsonl")
    assert [r.round for r in history.rounds] == [r.round for r in expected.rounds]
    assert (history.undone, history.problems) == (expected.undone, [])
    assert history.update() is False


def test_a_stop_is_no_end_once_the_run_goes_on(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 3)
    log.stop(3, "patience")
    again = Log(tmp_path)
    again.begin(3)
    history = read(tmp_path / "events.jsonl")
    assert history.stop is None
    assert history.patience_from == 3


def line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


DAMAGED = {
    "not JSON": b'{"event": "rou\n',
    "not UTF-8": b'{"event": "fault", "message": "\xff\xfe"}\n',
    "not an object": b"[1, 2]\n",
    "no kind": b'{"time_s": 1}\n',
    "a kind that is a number": b'{"event": 5}\n',
    "too deep": b'{"event": "round", "seconds": ' + b"[" * 100_000 + b"\n",
    "a field is missing": line(event="stop", schema=2, time_s=1.0, round=3),
    "a text for a number": line(
        event="evaluation", schema=2, time_s="soon", round=3, epoch=1, samples=1, error=1, metrics={},
        best=1, best_round=1, seconds=1,
    ),
    "figures of other ranks": line(
        event="ranks", schema=2, time_s=1.0, round=3, rounds=[1, 3], seconds={"compute": [1.0, 2.0]}
    ),
    "figures in figures": line(
        event="ranks", schema=2, time_s=1.0, round=3, rounds=[1, 3], seconds={"compute": [[1.0], [2.0]]}
    ),
    "texts for figures": line(
        event="ranks", schema=2, time_s=1.0, round=3, rounds=[1, 3], seconds={"compute": ["a"] * 4}
    ),
    "zeros": b"\0" * 40 + b"\n",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named_and_the_rest_is_read(
    damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_train.monitor.follow._LATE_S", 0.0)
    lines = whole(tmp_path).read_bytes().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_bytes(b"".join([*lines[:7], damage, *lines[7:]]))
    history = read(tmp_path / "events.jsonl")
    (problem,) = history.problems
    assert problem.startswith("line 8 of the log cannot be read (")
    assert problem.endswith("): left out.")
    assert len(problem) < 300
    assert [r.round for r in history.rounds] == list(range(1, 61))


def test_a_line_that_has_not_arrived_is_a_message(tmp_path: Path) -> None:
    path = whole(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    late = b"\0" * (len(lines[9]) - 1) + b"\n"
    path.write_bytes(b"".join([*lines[:9], late, *lines[10:]]))
    history = read(path)
    assert history.problems == ["line 10 of the log has not arrived completely yet."]
    assert history.starts
    path.write_bytes(b"".join(lines))
    history.update()
    assert (history.problems, history.rounds[-1].round) == ([], 60)


def test_many_damaged_lines_are_one_sentence(tmp_path: Path) -> None:
    path = whole(tmp_path)
    path.write_bytes(path.read_bytes() + b"{}\n" * 5)
    (problem,) = read(path).problems
    assert ", and 4 more like it: left out." in problem


def test_what_comes_before_the_first_header_is_left_out(tmp_path: Path) -> None:
    path = whole(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    history = read(path)
    assert history.problems[0].startswith(
        "line 1 of the log cannot be read (an event before the first header"
    )
    assert [start.round for start in history.starts] == [20]


def test_a_line_of_a_hundred_megabytes(tmp_path: Path) -> None:
    path = whole(tmp_path)
    content = path.read_bytes()
    with open(path, "wb") as file:
        file.write(content)
        for _ in range(100):
            file.write(b" " * 1_000_000)
        file.write(b"\n" + content.splitlines(keepends=True)[1])
    history = read(path)
    assert history.problems == [
        f"line {content.count(10) + 1} of the log is too long for an event: left out."
    ]
    assert history.rounds[-1].round == 1


def test_a_later_version_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    path = whole(tmp_path)
    lines = path.read_text().splitlines()
    later = [json.dumps({**json.loads(text), "schema": 9, "new": {"field": [1]}}) for text in lines]
    later.insert(5, json.dumps({"event": "moon", "schema": 9, "time_s": 1.0, "round": 4}))
    path.write_text("\n".join(later) + "\n")
    history = read(path)
    assert len(history.rounds) == 60
    assert history.problems == ["the log has schema 9, this program knows 2: what is new in it is not shown."]


def test_a_log_of_the_first_version(tmp_path: Path) -> None:
    path = whole(tmp_path)
    new = ("host_of_rank", "layers", "layer_sizes", "slowest")
    first = [
        json.dumps({k: v for k, v in {**json.loads(text), "schema": 1}.items() if k not in new})
        for text in path.read_text().splitlines()
        if json.loads(text)["event"] not in ("ranks", "machine", "layers")
    ]
    path.write_text("\n".join(first) + "\n")
    history = read(path)
    assert (history.problems, len(history.rounds)) == ([], 60)


def test_a_log_that_is_replaced_is_another_one(tmp_path: Path) -> None:
    history = History(whole(tmp_path / "a"))
    history.update()
    os.replace(whole(tmp_path / "b"), tmp_path / "a/events.jsonl")
    history.update()
    assert (len(history.starts), len(history.rounds)) == (2, 60)
    (tmp_path / "a/events.jsonl").write_bytes(b"")
    assert history.update() is True
    assert (history.starts, history.rounds, history.last) == ([], [], None)


def test_a_very_long_log_is_thinned_without_losing_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 100)
    monkeypatch.setattr(module, "_MOST_FIGURES", 4 * 4 * 30)
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 333, slow={1: 2.0}, loss=0.5, drift=None)
    log.log.close()
    history = read(tmp_path / "events.jsonl")
    assert 50 <= len(history.rounds) <= 100
    assert history.rounds[0].rounds[0] == 1
    assert history.rounds[-1].rounds[1] == 333
    followed = zip(history.rounds, history.rounds[1:], strict=False)
    assert all(b.rounds[0] == a.rounds[1] + 1 for a, b in followed)
    assert sum(r.samples for r in history.rounds) == 333 * 640
    assert {(r.loss, r.slowest) for r in history.rounds} == {(0.5, 1)}
    seconds = sum(r.seconds["compute"].max for r in history.rounds)
    assert seconds == pytest.approx(333 * 0.9)
    assert len(history.ranks) <= 30
    assert history.ranks[-1].rounds[1] == 333


def test_rounds_are_joined_as_the_log_joins_them() -> None:
    def one(number: int, samples: int, loss: float | None, **values: Any) -> Round:
        return Round(
            time_s=float(number), round=number, rounds=(number, number), epoch=number / 2, samples=samples,
            loss=loss, seconds={}, period=number, lr=0.1, drift=values.get("drift"),
            zero_weight=values.get("zero", []), slowest=None,
        )  # fmt: skip

    joined = module._joined(one(1, 100, 3.0, drift=0.5, zero=[3]), one(2, 300, 1.0, zero=[1]))
    assert (joined.rounds, joined.samples, joined.loss) == ((1, 2), 400, 1.5)
    assert (joined.drift, joined.zero_weight, joined.period, joined.epoch) == (0.5, [1, 3], 2, 1.0)
    assert module._joined(one(1, 0, None), one(2, 5, None)).loss is None
    assert module._joined(one(1, 5, 2.0), one(2, 0, None)).loss == 2.0


@SETTINGS
@given(data=st.data())
def test_any_prefix_of_a_log_is_a_log(data: st.DataObject, tmp_path: Path) -> None:
    content = (tmp_path / "whole/events.jsonl").read_bytes() if (tmp_path / "whole").exists() else None
    content = content or whole(tmp_path / "whole").read_bytes()
    length = data.draw(st.integers(0, len(content)))
    path = tmp_path / "events.jsonl"
    path.write_bytes(content[:length])
    history = read(path)
    assert history.problems == []
    assert all(a.round < b.round for a, b in zip(history.rounds, history.rounds[1:], strict=False))
    assert content[:length].count(b'"event":"header"') - len(history.starts) in (0, 1)


@SETTINGS
@given(data=st.data())
def test_any_mutation_of_a_log_gives_a_view_or_a_message(data: st.DataObject, tmp_path: Path) -> None:
    content = (tmp_path / "whole/events.jsonl").read_bytes() if (tmp_path / "whole").exists() else None
    mutant = bytearray(content or whole(tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        what = data.draw(st.sampled_from(("flip", "cut", "insert", "double")))
        if what == "flip":
            mutant[at] ^= data.draw(st.integers(1, 255))
        elif what == "cut":
            del mutant[at : at + data.draw(st.integers(1, 500))]
        elif what == "insert":
            mutant[at:at] = data.draw(st.binary(min_size=1, max_size=50))
        else:
            mutant[at:at] = mutant[at : at + data.draw(st.integers(1, 500))]
        if not mutant:
            mutant += b"x"
    path = tmp_path / "events.jsonl"
    path.write_bytes(mutant)
    history = read(path)
    lines = [text for text in bytes(mutant).split(b"\n")[:-1] if text.strip()]
    assert history.problems or history.last is not None or not lines
    assert all(problem.endswith(".") for problem in history.problems)
