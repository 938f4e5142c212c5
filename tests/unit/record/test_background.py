"""A sink in a thread: the training never waits for it, and what is lost is said."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hvd_train.config import RecordConfig
from hvd_train.errors import ConfigError
from hvd_train.record import background
from hvd_train.record.background import Background, close_all
from hvd_train.record.reports import Report, RunStart
from hvd_train.record.sinks import make_sinks
from tests.deadlines import seconds
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report


class Kept:
    """Keeps what it is given, once `go` is set."""

    def __init__(self) -> None:
        self.events: list[RunStart | Report] = []
        self.go = threading.Event()
        self.thread: threading.Thread | None = None
        self.closed = 0

    def record(self, event: RunStart | Report) -> None:
        self.thread = threading.current_thread()
        assert self.go.wait(seconds(60))
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def test_events_arrive_in_order_in_another_thread_and_the_end_waits_for_them() -> None:
    sink = Kept()
    recorder = Background("mine", lambda: sink)
    given = [round_report(1), evaluation(1, 0.5, 0.5, 1), round_report(2), STOP]
    recorder.header(HEADER)
    for report in given:
        recorder.report(report)
    assert sink.events == [], "nobody waited for it"
    sink.go.set()
    recorder.close()
    recorder.close()
    assert sink.events == [HEADER, *given]
    assert sink.thread is not threading.main_thread()
    assert sink.closed == 1


def test_what_finds_the_queue_full_is_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Kept()
    recorder = Background("mine", lambda: sink, capacity=5)
    recorder.header(HEADER)
    for number in range(1, 2001):
        recorder.report(round_report(number))
    sink.go.set()
    recorder.close()
    # One event may have been taken out of the queue before it was full.
    assert len(sink.events) in (5, 6)
    left_out = 2001 - len(sink.events)
    assert capsys.readouterr().err == (
        f"hvd_train: mine was too slow for {left_out:,} events, which are missing there.\n"
    )


def test_a_sink_that_hangs_does_not_hold_the_end_up_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Kept()
    recorder = Background("mine", lambda: sink, patience_s=0.01)
    recorder.header(HEADER)
    recorder.close()
    assert "mine has not taken 1 events within 0.01 s of the end of the run" in capsys.readouterr().err
    sink.go.set()


@pytest.mark.parametrize("error", [ValueError("no such run"), SystemExit(3), KeyboardInterrupt()])
def test_a_sink_that_raises_is_said_once_and_gets_the_next_event(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def __init__(self) -> None:
            self.calls = 0

        def record(self, event: RunStart | Report) -> None:
            self.calls += 1
            raise error

    sink = Failing()
    recorder = Background("mine", lambda: sink)
    recorder.header(HEADER)
    recorder.report(STOP)
    recorder.close()
    assert sink.calls == 2
    assert capsys.readouterr().err == (
        f"hvd_train: mine failed on RunStart: {type(error).__name__}: {error}. The training goes on.\n"
        "hvd_train: mine failed on 2 events.\n"
    )


def test_a_sink_that_was_given_nothing_is_closed() -> None:
    sink = Kept()
    Background("mine", lambda: sink).close()
    assert sink.closed == 1


def test_a_sink_that_is_not_made_in_time() -> None:
    go = threading.Event()

    def make() -> Kept:
        go.wait(seconds(60))
        return Kept()

    with pytest.raises(ConfigError, match=r"mine was not ready within 0\.01 s"):
        Background("mine", make, start_s=0.01)
    go.set()


def test_a_sink_whose_end_hangs_does_not_hold_up_a_run_that_failed_early(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Hanging(Kept):
        def close(self) -> None:
            self.go.wait(seconds(60))

    sink = Hanging()
    Background("mine", lambda: sink, patience_s=0.01).close()
    assert "mine has not taken" in capsys.readouterr().err
    sink.go.set()


def test_sinks_end_side_by_side() -> None:
    """Each of them ends when all have been told to: one after the other they would never."""
    meeting = threading.Barrier(3, timeout=seconds(30))

    class Meeting(Kept):
        def close(self) -> None:
            meeting.wait()
            super().close()

    sinks = [Meeting() for _ in range(3)]
    close_all([Background(str(i), lambda sink=sink: sink) for i, sink in enumerate(sinks)])  # type: ignore[misc]
    assert [sink.closed for sink in sinks] == [1, 1, 1]


def test_a_rank_that_waits_for_a_sink_shows_that_it_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait in a collective call meanwhile, and would give it up."""
    sink = Kept()
    monkeypatch.setattr(background, "_SLICE_S", 0.01)
    recorder = Background("mine", lambda: sink)
    recorder.header(HEADER)
    monkeypatch.setattr(background, "mark", sink.go.set)
    recorder.close()
    assert sink.events == [HEADER]


SINK = """
class Sink:
    def record(self, event):
        print(type(event).__name__)

def make():
    return Sink()

def none():
    return None

def failing():
    raise ValueError("no server")

def leaving():
    raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sink.py", "expected file.py:factory or package.module:factory"),
        (":make", "expected file.py:factory or package.module:factory"),
        ("other.py:make", "record.sinks: there is no file other.py; expected the Python file of the sink"),
        ("no_such_package.x:make", "record.sinks: there is no module no_such_package"),
        ("sink.py:maker", "sink.py has no function 'maker' that makes the sink"),
        ("sink.py:none", "gave None; expected an object with a method record"),
        ("sink.py:failing", "sink.py:failing failed: ValueError: no server"),
        ("sink.py:leaving", "sink.py:leaving failed: SystemExit: 0"),
        (
            "broken.py:make",
            r"broken.py cannot be loaded: NameError: name 'nothing' is not defined \(broken.py, line 1\)",
        ),
    ],
)
def test_a_sink_that_cannot_be_used(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sink.py").write_text(SINK)
    Path("broken.py").write_text("nothing\n")
    with pytest.raises(ConfigError, match=said):
        make_sinks(RecordConfig(sinks=(name,)))


def test_a_sink_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sink.py").write_text(SINK)
    (recorder,) = make_sinks(RecordConfig(sinks=(f"{tmp_path}/sink.py:make",)))
    recorder.header(HEADER)
    recorder.close()
    assert capfd.readouterr().out == "RunStart\n"
