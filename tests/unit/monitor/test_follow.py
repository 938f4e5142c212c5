"""A log that grows, is torn, arrives late, is cut, replaced, and gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvd_train.monitor import follow
from hvd_train.monitor.follow import Follower


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def add(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


def test_complete_lines_are_given_once(path: Path) -> None:
    follower = Follower(path)
    add(path, b"one\ntwo\nthr")
    assert (list(follower.lines()), follower.number) == ([b"one", b"two"], 2)
    assert list(follower.lines()) == []
    add(path, b"ee")
    assert list(follower.lines()) == []
    add(path, b"\n\nfive\n")
    assert (list(follower.lines()), follower.number) == ([b"three", b"", b"five"], 5)
    assert not follower.restarted


def test_a_reader_that_leaves_early_goes_on_there(path: Path) -> None:
    follower = Follower(path)
    add(path, b"one\ntwo\nthree\n")
    for line in follower.lines():
        assert line == b"one"
        break
    assert list(follower.lines()) == [b"two", b"three"]


def test_lines_longer_than_a_block_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_BLOCK_BYTES", 7)
    lines = [b"x" * n for n in (0, 1, 6, 7, 8, 100)]
    add(path, b"\n".join(lines) + b"\n")
    assert list(Follower(path).lines()) == lines


def test_a_line_that_is_too_long_is_skipped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(follow, "_BLOCK_BYTES", 16)
    follower = Follower(path)
    add(path, b"one\n" + b"x" * 90)
    assert list(follower.lines()) == [b"one"]
    assert follower.skipped == []
    add(path, b"x" * 1000)
    assert list(follower.lines()) == []
    add(path, b"x" * 5 + b"\nthree\n")
    assert (list(follower.lines()), follower.skipped) == ([b"three"], [2])
    add(path, b"y" * 70 + b"\nfive\n")
    assert (list(follower.lines()), follower.skipped, follower.number) == ([b"five"], [2, 4], 5)


def test_bytes_that_arrive_late_are_waited_for_and_then_given_up(path: Path) -> None:
    now = 0.0
    follower = Follower(path, lambda: now)
    add(path, b"one\n\0\0\0\0\nthree\n")
    assert list(follower.lines()) == [b"one"]
    now = 50.0
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(b"two!")
    assert list(follower.lines()) == [b"two!", b"three"]
    add(path, b"\0\0\nfive\n")
    assert list(follower.lines()) == []
    now = 109.0
    assert list(follower.lines()) == []
    now = 111.0
    assert list(follower.lines()) == [b"\0\0", b"five"]


def test_a_log_that_was_cut_or_replaced_is_read_again(path: Path, tmp_path: Path) -> None:
    follower = Follower(path)
    add(path, b"one\ntwo\n")
    assert len(list(follower.lines())) == 2
    os.truncate(path, 4)
    assert (list(follower.lines()), follower.restarted) == ([b"one"], True)
    other = tmp_path / "other"
    add(other, b"ONE\nTWO\nTHREE\n")
    os.replace(other, path)
    assert (list(follower.lines()), follower.restarted) == ([b"ONE", b"TWO", b"THREE"], True)
    assert (list(follower.lines()), follower.restarted) == ([], False)


def test_a_log_that_is_not_there_yet_or_no_longer(path: Path) -> None:
    follower = Follower(path)
    with pytest.raises(FileNotFoundError):
        list(follower.lines())
    add(path, b"one\n")
    assert list(follower.lines()) == [b"one"]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(follower.lines())
