"""What `hvd_train status` prints, plain and live on a terminal, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvd_train.cli import main
from hvd_train.monitor.history import History
from hvd_train.monitor.status import curve
from hvd_train.run.claim import take
from tests.deadlines import Deadline, seconds
from tests.launching import ROOT
from tests.terminal import terminal
from tests.unit.monitor.logs import Log, whole


def status(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert main(["status", *args]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def test_a_folder_of_runs_is_a_table_with_the_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path / "older")
    log = Log(tmp_path / "newer-<script>[bold]", ranks=2, hosts=("h1",))
    log.now += 1000
    log.begin()
    log.rounds(1, 3)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/events.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured/config.toml").touch()
    head, *lines = status(capsys, str(tmp_path))
    assert head.split() == ["run", "state", "event", "round", "error", "best", "samples/s", "ranks", "hosts"]
    assert [line.split()[0] for line in lines] == [
        "newer-<script>[bold]", "older", "broken", "configured",
    ]  # fmt: skip
    assert lines[0].split()[1] == "crashed"
    assert lines[0].split()[-6:] == ["3", "-", "-", "640", "2", "1"]
    assert lines[1].split()[1:3] == ["finished:", "patience"]
    assert lines[1].split()[-6:] == ["60", "0.0167", "0.0139", "306", "4", "2"]
    assert "empty (its log does not begin with a header)" in lines[2]
    assert lines[3].split()[1:] == ["empty", *["-"] * 7]


def test_a_run_in_detail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = whole(tmp_path / "a")
    path.write_bytes(path.read_bytes() + b"{}\n")
    (tmp_path / "a/checkpoints/round-20").mkdir(parents=True)
    for name in ("a", "a/checkpoints/round-20"):
        assert [line[:10].strip() for line in status(capsys, str(tmp_path / name))] == [
            "run", "training", "progress", "error", "time", "slow", "memory", "layer", "log",
        ]  # fmt: skip
    run, training, progress, error, phases, slow, memory, layer, log = status(capsys, str(tmp_path / "a"))
    assert run.endswith("/a: finished, the error has not improved for 15 evaluations")
    assert training.endswith("classification, mlp 64-128-64-10; 4 ranks on 2 hosts")
    assert "round 60, epoch 15.00, loss 0.0167, 306 samples/s" in progress
    assert error.endswith("█▁ 0.2500, best 0.2500 in round 60")
    assert phases.endswith("data 5%, compute 43%, communication 5%, wait 48%")
    assert "rank 2 on h2 is busy 2.0 times as long as the median, in local steps" in slow
    assert "1.00 GiB in the largest rank, 8.0 GiB left on the host with least" in memory
    assert "`first.bias` hardly learns: log10 of its relative step is -11.0" in layer
    assert re.fullmatch(r"log       line \d+ of the log cannot be read \(.+\): left out\.", log)


def test_faults_and_what_will_stop_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path)
    log.begin(stop_rules={"max_rounds": 10})
    log.rounds(1, 3)
    for number in range(5):
        log.fault(3, f"fault {number} [/bold] \x1b[31m")
    with take(tmp_path):
        lines = status(capsys, str(tmp_path))
    assert "stops at  7 rounds to the limit" in lines
    faults = [line for line in lines if line.startswith("fault")]
    assert [line[:27] for line in faults] == [f"fault     round 3: fault {n} " for n in (2, 3, 4)]
    assert not any("\x1b" in line for line in lines), "a log cannot write to the terminal"


def test_a_run_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    run, log = status(capsys, str(tmp_path))
    assert run.endswith(": empty, there is no event in its log")
    assert log == "log       there is no event log yet"


def test_a_path_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "has no runs. Expected a folder of runs, or a run with an event log." in capsys.readouterr().err
    assert main(["status", str(tmp_path / "gone")]) == 2
    assert "gone: No such file or directory. Expected a folder of runs" in capsys.readouterr().err


def test_the_curve_fits_a_line_and_any_encoding(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    for number in range(1, 301):
        log.evaluate(number, 1 / number, 1 / number, number)
    log.evaluate(301, float("nan"), 1 / 300, 300)
    history = History(tmp_path / "events.jsonl")
    history.update()
    line = curve(history, " ▁▂▃▄▅▆▇█")
    assert (len(line), line[0], line[-1]) == (60, "█", "▁")
    assert curve(history, " _.-=+*#@")[-1] == "_"


@contextlib.contextmanager
def on_terminal(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """`hvd_train status` on a terminal of 100 columns; and what it has printed so far."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    argv = [sys.executable, "-m", "hvd_train", "status", *args]
    with terminal(columns=100) as (theirs, seen):
        # A background job of a shell ignores Ctrl-C, and so does what it starts.
        process = subprocess.Popen(
            argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        try:
            yield process, lambda: b"".join(seen).decode(errors="replace")
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """Of a run that goes on, after three rounds; its folder is `tmp_path`."""
    log = Log(tmp_path)
    log.now = time.time()
    log.begin()
    log.rounds(1, 3)
    with take(tmp_path):
        yield log


def until(condition: Callable[[], bool]) -> None:
    deadline = Deadline(60)
    while not condition():
        assert not deadline.passed(), "it was not printed"
        threading.Event().wait(0.05)


def test_the_view_of_a_run_that_goes_on_is_live_until_it_ends(log: Log, tmp_path: Path) -> None:
    with on_terminal(str(tmp_path)) as (process, printed):
        until(lambda: "round 3," in printed())
        log.rounds(4, 8)
        until(lambda: "round 8," in printed())
        (tmp_path / "events.jsonl").rename(tmp_path / "moved")
        until(lambda: "the log is gone" in printed())
        (tmp_path / "moved").rename(tmp_path / "events.jsonl")
        assert process.poll() is None
        log.stop(8)
        assert process.wait(timeout=seconds(60)) == 0
        until(lambda: "finished" in printed())


@pytest.mark.usefixtures("log")
def test_ctrl_c_ends_the_view_without_a_traceback(tmp_path: Path) -> None:
    with on_terminal(str(tmp_path)) as (process, printed):
        until(lambda: "round 3," in printed())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=seconds(60)) == -signal.SIGINT
        assert "Traceback" not in printed()


@pytest.mark.usefixtures("log")
def test_once_prints_once_on_a_terminal_too(tmp_path: Path) -> None:
    with on_terminal(str(tmp_path), "--once") as (process, printed):
        assert process.wait(timeout=seconds(60)) == 0
        until(lambda: "round 3," in printed())
