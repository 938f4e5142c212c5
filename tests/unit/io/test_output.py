"""A run outlives its console and the disk of its event log."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvd_train.io.output import warn
from hvd_train.record.console import BarConsole, PlainConsole
from hvd_train.record.events import EventLog, read_events
from hvd_train.record.reports import FaultReport
from tests.deadlines import seconds
from tests.launching import ROOT, environment
from tests.unit.run_reports import HEADER, STOP, evaluation, round_report


def fault(round: int, message: str) -> FaultReport:
    return FaultReport(round=round, kind="test", ranks=(), message=message)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes; of a longer write a part is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_warned_of_once_and_the_log_stays_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.header(HEADER)
    size = path.stat().st_size
    with room_for(size + 10):  # ten bytes of the next line can be written
        log.report(fault(1, "lost"))
        log.report(fault(2, "lost as well"))
        assert path.stat().st_size == size, "the part that was written is taken back"
    log.report(fault(3, "written"))
    log.close()
    assert [(e["event"], e["round"]) for e in read_events(path)] == [("header", 0), ("fault", 3)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"hvd_train: {path}: cannot be written: File too large. Training goes on")


def test_rounds_that_were_held_back_may_be_lost_with_the_disk(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=lambda: 1e9)
    log.report(round_report(1))
    log.report(round_report(2))  # within a tenth of a second: waits for the next event
    with room_for(1):
        log.report(STOP)
        log.close()
    assert [e["rounds"] for e in read_events(tmp_path / "events.jsonl")] == [[1, 1]]


CONSOLE = """
import sys
from hvd_train.record.console import make_console
from tests.unit.run_reports import HEADER, STOP, evaluation
console = make_console()
console.header(HEADER)
for line in sys.stdin:  # the reader has left
    console.report(evaluation(4, 0.5, 0.25, 2))
console.report(STOP)
console.close()
print("said to nobody")
print("still here", file=sys.stderr)
"""


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    """As behind `| head -1`; nor does Python complain at its end of what it could not write."""
    with subprocess.Popen(
        [sys.executable, "-c", CONSOLE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment({"PYTHONPATH": str(ROOT)}),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("hvd_train 0.1.0: classification")
        process.stdout.close()
        process.stdout = None
        _, stderr = process.communicate("\n\n", timeout=seconds(60))
    assert stderr.splitlines() == [
        "hvd_train: standard output cannot be written: Broken pipe. Training goes on without it.",
        "still here",
    ]
    assert process.returncode == 0


def test_a_console_on_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as stream:
        console = PlainConsole(stream)
        console.header(HEADER)
        console.report(evaluation(4, 0.5, 0.25, 2))
        console.report(STOP)
        console.close()
    said = "standard output cannot be written: No space left on device. Training goes on without it."
    assert capsys.readouterr().err == f"hvd_train: {said}\n"


def test_a_terminal_that_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a lost connection, where the run ignores the hang-up."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream:
        console = BarConsole(stream)
        console.header(HEADER)
        os.close(ours)
        console.report(round_report(4))
        console.report(evaluation(4, 0.5, 0.25, 2))
        console.report(STOP)
        console.close()
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull


def test_a_warning_on_a_closed_stream_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        warn("hello")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # so that it can be closed


def test_a_complete_run_continues_without_its_reader(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "hvd_train", "--backend", "solo", "--runs", str(tmp_path), "--name", "r"]
    with subprocess.Popen(
        [*argv, "--max-rounds", "12", "--patience", "0", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"PYTHONPATH": str(ROOT)}),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=seconds(60)) == 0, said
    assert said.count("\n") == 1
    last = json.loads((tmp_path / "r" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["round"]) == ("stop", 12)


def test_a_name_that_is_not_utf_8_is_recorded_and_printed_with_escapes(tmp_path: Path) -> None:
    """As of a shard that a pattern found, or of a host, in whatever locale."""
    message = "shard gr\xf6\xdfe\udcff.h5 is not finite"
    log = EventLog(tmp_path / "events.jsonl")
    log.header(HEADER)
    log.report(fault(1, message))
    log.close()
    for line in (tmp_path / "events.jsonl").read_bytes().splitlines():
        json.loads(line.decode("utf-8"))
    (recorded,) = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "fault"]
    assert recorded["message"] == "shard gr\xf6\xdfe\\udcff.h5 is not finite"
    for encoding in ("ascii", "latin-1", "utf-8"):
        with open(tmp_path / encoding, "w", encoding=encoding) as stream:
            console = PlainConsole(stream)
            console.header(HEADER)
            console.report(fault(1, message))
            console.close()
        assert "\\udcff.h5 is not finite" in (tmp_path / encoding).read_text(encoding=encoding)
