"""The table's figures, from the ends of logs; and the state, by the log and the claim."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from hvd_train.monitor import overview as module
from hvd_train.monitor.overview import age, overview, runs_in
from hvd_train.run.claim import take
from tests.deadlines import seconds
from tests.unit.monitor.logs import START_S, Log, whole
from tests.unit.run.test_claim import HOLD, answer, child


def test_a_run_that_finished(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    found = overview(tmp_path / "a")
    assert (found.name, found.state.name, found.state.detail) == ("a", "finished", "patience")
    assert (found.round, found.ranks, found.hosts, found.metric) == (60, 4, 2, "error")
    assert (found.best, found.last) == (0.0139, 0.0167)
    assert found.samples_per_s == pytest.approx(38400 / 125.4)
    assert age(found, START_S + 100) == pytest.approx(30.0)
    assert found.problem == ""


@pytest.mark.parametrize("reason", ["interrupted", "diverged"])
def test_a_run_that_ended_otherwise(tmp_path: Path, reason: str) -> None:
    log = Log(tmp_path / "a")
    log.begin()
    log.rounds(1, 3)
    log.stop(3, reason, best=None, final=None)
    found = overview(tmp_path / "a")
    assert (found.state.name, found.best, found.last) == (reason, None, None)


def test_the_speed_of_a_run_without_an_end_is_that_of_its_last_rounds(tmp_path: Path) -> None:
    log = Log(tmp_path / "a")
    log.begin()
    log.rounds(1, 100, samples=1)
    log.rounds(101, 120, samples=50)
    log.evaluate(120, 0.4, 0.3, 80)
    log.rounds(121, 140, samples=100)
    found = overview(tmp_path / "a")
    assert found.samples_per_s == pytest.approx(100.0)
    assert (found.round, found.last, found.best) == (140, 0.4, 0.3)


def test_only_the_end_of_a_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = whole(tmp_path / "a")
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = b"x" * 500 + b"\n"
    path.write_bytes(lines[0] + damaged * 1000 + content)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    assert overview(tmp_path / "a").problem == ""
    monkeypatch.setattr(module, "_END_BYTES", 5000)
    assert (overview(tmp_path / "a").round, overview(tmp_path / "a").ranks) == (60, 4)


def test_a_log_that_cannot_be_used_is_a_problem_of_its_run(tmp_path: Path) -> None:
    for name, content in {
        "binary": bytes(range(256)) * 100,
        "foreign": b'{"hello": "world"}\n' * 50,
        "huge line": b"x" * 3_000_000,
        "torn": b'{"event": "head',
        "empty": b"",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_bytes(content)
    (tmp_path / "a folder/events.jsonl").mkdir(parents=True)
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured/config.toml").touch()
    (tmp_path / "no run").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    found = {path.name: overview(path) for path in runs_in(tmp_path)}
    assert {name: (run.state.name, run.problem) for name, run in found.items()} == {
        "a folder": ("crashed", "its log cannot be read: Is a directory"),
        "binary": ("empty", "its log does not begin with a header"),
        "configured": ("empty", ""),
        "empty": ("empty", ""),
        "foreign": ("empty", "its log does not begin with a header"),
        "huge line": ("empty", "its log has no complete line"),
        "torn": ("empty", "its log has no complete line"),
    }


def test_a_resume_with_other_ranks_is_shown_with_those(tmp_path: Path) -> None:
    log = Log(tmp_path / "a", ranks=2, hosts=["h"])
    log.begin()
    log.rounds(1, 5)
    log = Log(tmp_path / "a", ranks=6, hosts=["h1", "h2", "h3"])
    log.begin(5)
    log.rounds(6, 10)
    log.stop(10)
    assert (overview(tmp_path / "a").ranks, overview(tmp_path / "a").hosts) == (6, 3)


def test_damaged_lines_at_the_end_are_a_problem(tmp_path: Path) -> None:
    path = whole(tmp_path / "a")
    path.write_bytes(path.read_bytes() + b"\xff\n{}\n")
    found = overview(tmp_path / "a")
    assert (found.state.name, found.problem) == ("finished", "lines of its log cannot be read")


def test_a_run_whose_job_lives_is_running_and_crashed_once_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with child(HOLD, str(folder)) as process:
        assert answer(process).startswith("holds")
        assert overview(folder).state.name == "starting"
        log = Log(folder)
        log.begin()
        log.rounds(1, 2)
        assert overview(folder).state.name == "running"
        process.send_signal(signal.SIGSTOP)
        assert overview(folder).state.name == "running"
        process.kill()
        process.wait(timeout=seconds(30))
        found = overview(folder).state
        assert (found.name, found.detail.endswith("was killed")) == ("crashed", True)


def test_a_run_whose_job_left_without_a_stop_crashed(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    assert overview(tmp_path).state.name == "crashed"
    with take(tmp_path):
        assert overview(tmp_path).state.name == "running"
    found = overview(tmp_path).state
    assert (found.name, found.detail.endswith("ended without a `stop` in the log")) == ("crashed", True)


def test_a_run_that_ended_starts_again_once_a_later_job_holds_it(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.now = time.time()
    with take(tmp_path):
        log.stop(1)
        assert overview(tmp_path).state.name == "finished", "its job is about to end"
    with take(tmp_path):
        later = time.time() + 60
        for claim in tmp_path.glob(".claim-*"):
            os.utime(claim, (later, later))
        assert overview(tmp_path).state.name == "starting"


def test_a_job_elsewhere_runs_as_long_as_it_gives_a_sign(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    with take(tmp_path, beat_s=1000):
        (claim,) = tmp_path.glob(".claim-*")
        here = f'"host":"{os.uname().nodename}"'
        assert here in claim.read_text()
        claim.write_text(claim.read_text().replace(here, '"host":"node17"'))
        now = claim.stat().st_mtime
        assert overview(tmp_path, now + 50).state.name == "running"
        found = overview(tmp_path, now + 700).state
        assert found.name == "crashed"
        assert "on node17" in found.detail
        assert found.detail.endswith("has given no sign of life for 11 min 40 s")
