"""What a user reads: the exact plain text of a small run, and the bar on a real pseudo-terminal."""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from hvd_train.config import StopConfig
from hvd_train.record.console import BarConsole, PlainConsole, is_terminal, make_console
from hvd_train.record.reports import FaultReport, PeriodReport, RunStart, StopReport
from hvd_train.record.wording import REASONS, closing_lines, duration, header_lines, number
from tests import terminal as terminals
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report

TEXT = """\
hvd_train 0.1.0: classification, mlp 64-128-64-10, 17,226 parameters
data      digits: 1 shard and 717 to 720 samples per rank, 360 validation samples
world     2 ranks on 1 host (node1), backend mpi, 1 thread per rank; a killed rank ends the job
training  batches of 32, average every 10 local steps
stop      15 evaluations without a better error or 2,000 rounds
digits    rank 0 sees only the digits 0-4, rank 1 only 5-9: neither can learn the ten classes from its own \
shard, only the average can
run       runs/first
round      4  epoch    1.00  error 0.5000 (best 0.2500)  loss 0.2500      1,280 samples/s  communication  25%
round     14  epoch    3.50  error 0.5000 (best 0.2500)  loss 0.0714        640 samples/s  communication  25%
warning   round 15: rank 1 was not finite
round     16  epoch    4.00  error 0.0139 (best 0.0139)  loss 0.0625        640 samples/s  communication  25%
stopped   the error has not improved for 15 evaluations (round 60)
error     best 0.0139 at round 30, final 0.0167
speed     38,400 samples in 2 min 5 s: 306 samples/s
run       runs/first
best      runs/first/checkpoints/round-30
load it   hvd_train.load_model("runs/first")
go on     --resume runs/first
"""


def test_how_the_ranks_read_is_in_the_header() -> None:
    def lines(*reading: str) -> list[str]:
        return [line for line in header(reading=reading).splitlines() if line.startswith("reading")]

    assert lines("memory: the rows fit") == ["reading   memory: the rows fit"]
    assert lines("memory: the rows fit", "stream: they do not", "memory: the rows fit") == [
        "reading   memory on ranks 0, 2: the rows fit",
        "reading   stream on rank 1: they do not",
    ]
    assert lines() == []


def test_the_plain_text_of_a_small_run() -> None:
    stream, now = io.StringIO(), 0.0
    console = PlainConsole(stream, clock=lambda: now)
    console.header(HEADER)
    for i in (1, 2, 3, 4):
        now += 0.5
        console.report(round_report(i))
    now += 0.25  # what the evaluation takes
    console.report(evaluation(4, 0.5, 0.25, 2))
    for i in range(5, 15):  # ten seconds without an evaluation: one line, at their end
        now += 1
        console.report(round_report(i))
    for i in (15, 16):
        now += 1
        console.report(round_report(i))
        if i == 16:
            now += 0.25
        if i == 15:
            console.report(
                FaultReport(round=15, kind="not_finite", ranks=(1,), message="rank 1 was not finite")
            )
    console.report(evaluation(16, 0.0139, 0.0139, 16))
    console.report(STOP)
    console.close()
    assert stream.getvalue() == TEXT


def test_a_period_that_changes_is_in_every_line() -> None:
    stream = io.StringIO()
    console = PlainConsole(stream, clock=lambda: 1.0)
    rule = "average gradients in every local step of the first 3 rounds, then parameters every 10 local steps"
    console.header(dataclasses.replace(HEADER, schedule=rule))
    console.report(round_report(3, period=1))
    console.report(PeriodReport(round=3, period=10, message="every round has 10 from round 4 on."))
    console.report(evaluation(3, 0.5, 0.5, 3))
    lines = stream.getvalue().splitlines()
    assert f"training  batches of 32, {rule}" in lines
    assert lines[-2] == "period    round 3: every round has 10 from round 4 on."
    assert lines[-1].startswith("round      3  k    1  epoch    0.75  error 0.5000")


def last_words(**changes: object) -> list[str]:
    return closing_lines(dataclasses.replace(HEADER, **changes), STOP)[-2:]  # type: ignore[arg-type]


def test_the_resume_command_can_be_pasted() -> None:
    run = 'my "runs"/früh $1'
    assert last_words(run=run) == [
        'load it   hvd_train.load_model("my \\"runs\\"/früh $1")',
        "go on     --resume 'my \"runs\"/früh $1'",
    ]
    assert shlex.split(last_words(run=run)[1])[-1] == run
    assert ast.literal_eval(last_words(run=run)[0].partition("(")[2].rpartition(")")[0]) == run


def test_a_run_that_was_never_averaged_cannot_be_resumed() -> None:
    assert last_words(period=None)[1] == 'load it   hvd_train.load_model("runs/first")'


def test_a_task_that_was_given_must_be_given_again() -> None:
    assert last_words(task_is_given=True) == [
        'load it   hvd_train.load_model("runs/first", task=...)',
        'go on     the same program, with resume = "runs/first" in its configuration',
    ]


def test_before_the_first_evaluation_there_are_dashes() -> None:
    stream, now = io.StringIO(), 0.0
    console = PlainConsole(stream, clock=lambda: now)
    console.header(HEADER)
    stream.seek(0)
    stream.truncate()
    now = 10.0
    console.report(round_report(1, seconds={}))
    expected = "round      1  epoch    0.25  error -  loss 1.0000         64 samples/s  communication    -\n"
    assert stream.getvalue() == expected


def header(**changes: object) -> str:
    return "\n".join(header_lines(dataclasses.replace(HEADER, **changes)))  # type: ignore[arg-type]


def test_headers_of_other_runs() -> None:
    alone = header(world_size=1, backend="solo", shards_per_rank=[2], samples_per_rank=[1437], threads=[2])
    assert "world     1 rank on 1 host (node1), backend solo, 2 threads per rank\n" in alone
    assert "data      digits: 2 shards and 1,437 samples per rank" in alone
    assert "neither" not in alone
    assert "neither" not in header(data="data/mnist")
    many = header(world_size=6, hosts=tuple(f"n{i}" for i in range(6)))
    assert "6 ranks on 6 hosts (n0, n1, n2, n3, ...)" in many
    assert "no validation data, so that the error is the smoothed training loss" in header(
        validation_samples=0
    )
    assert "batches of 32, the ranks are never averaged" in header(period=None)
    assert "batches of 32, average after every local step" in header(period=1)
    assert "resumed   after round 40" in header(round=40)
    rules = {"target_error": 0.025, "max_epochs": 1, "max_seconds": 90.0, "divergence": 4.0, "min_delta": 0.1}
    assert "stop      error 0.025 or 1 epoch or 90 s or error above 4 times the best\n" in header(
        stop_rules=rules
    )


def test_every_stop_rule_and_every_reason_has_words() -> None:
    rules = {f.name: 3 for f in dataclasses.fields(StopConfig) if f.name != "min_delta"}
    run = dataclasses.replace(HEADER, stop_rules=rules)
    assert header_lines(run)[4].count(" or ") == len(rules) - 1
    for reason in REASONS:
        first = closing_lines(run, dataclasses.replace(STOP, reason=reason))[0]
        assert len(first.split()) >= 6
        assert "{" not in first


def test_final_lines_of_other_runs() -> None:
    def ending(run: RunStart = HEADER, **changes: object) -> list[str]:
        return closing_lines(run, dataclasses.replace(STOP, **changes))  # type: ignore[arg-type]

    nothing = ending(best=None, best_round=None, final=None, samples=0, seconds=0.0, checkpoints={})
    assert nothing[1:] == ["error     never measured", "speed     0 samples in 0.0 s", "run       runs/first"]
    assert ending(best=None, final=float("nan"))[1] == "error     never measured; last nan"
    assert (
        ending(dataclasses.replace(HEADER, metric="mae"))[1]
        == "mae       best 0.0139 at round 30, final 0.0167"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.0000"),
        (0.01394, "0.0139"),
        (0.00021, "0.00021"),
        (1234.5, "1234"),
        (5e6, "5e+06"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.24, "8.2 s"), (59.99, "60.0 s"), (125.4, "2 min 5 s"), (12_060, "3 h 21 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, list[bytes]]]:
    """A terminal as a text stream, and what is printed on it, which is complete after the block."""
    with (
        terminals.terminal(columns) as (descriptor, seen),
        os.fdopen(descriptor, "w", encoding="utf-8") as stream,
    ):
        yield stream, seen


def test_a_terminal_has_a_width() -> None:
    with terminal(columns=100) as (stream, _):
        assert is_terminal(stream)
        assert isinstance(make_console(stream), BarConsole)
    with terminal(columns=0) as (stream, _):
        assert stream.isatty()
        assert not is_terminal(stream)
        assert isinstance(make_console(stream), PlainConsole)
    with open(os.devnull, "w", encoding="utf-8") as stream:
        assert not is_terminal(stream)
    assert not is_terminal(io.StringIO())


def test_the_bar_moves_and_leaves_only_lines_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    run = dataclasses.replace(HEADER, stop_rules={"max_rounds": 60})
    with terminal(columns=140) as (stream, seen):
        console = make_console(stream)
        console.header(run)
        console.report(round_report(30))
        console.report(evaluation(30, 0.0139, 0.0139, 30))
        stop: StopReport = dataclasses.replace(STOP, reason="max_rounds")
        console.report(stop)
        console.close()
        console.close()
    raw = b"".join(seen).decode()
    assert "\x1b[?25l" in raw
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "the cursor is hidden and comes back"
    bar = next(line for line in re.split(r"[\r\n]", raw) if "━" in line and "round" in line)
    assert re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bar).startswith("━━━━━━━━━━")
    assert "round     30  epoch    7.50  error -" in bar
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]+", raw)]
    assert header_lines(run)[0] in lines
    assert any(line.startswith("round     30  epoch    7.50  error 0.0139 (best 0.0139)") for line in lines)
    ending = closing_lines(run, stop)
    assert lines[lines.index(ending[0]) :][: len(ending)] == ending


def test_a_bar_is_closed_after_an_error_before_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with terminal(columns=80) as (stream, seen):
        make_console(stream).close()
    assert b"\x1b[?25l" not in b"".join(seen)
