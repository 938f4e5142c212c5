"""How long a rank waits for others, what it says when it gives up, and what stays of its signs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hvd_train.liveness import Liveness, mark, phase
from tests.deadlines import Deadline


def signs_of(folder: Path) -> list[Path]:
    return list(folder.glob(".hvd_train-signs-*"))


def test_without_signs_the_time_to_wait_grows_with_the_longest_work() -> None:
    liveness = Liveness(stall_timeout_s=0.01)
    time.sleep(0.1)
    with liveness:
        assert liveness.allowed_s >= 3 * 0.1
        assert not liveness.give_up(0.2)
        assert liveness.give_up(liveness.allowed_s + 0.1)


def test_without_signs_the_time_grows_with_the_longest_wait() -> None:
    liveness = Liveness(stall_timeout_s=0.01)
    with liveness:
        time.sleep(0.1)
    with liveness:
        assert liveness.allowed_s >= 2 * 0.1


def test_a_nested_call_is_not_a_separate_wait() -> None:
    liveness = Liveness(stall_timeout_s=0.01)
    with liveness:
        allowed_s = liveness.allowed_s
        time.sleep(0.2)
        with liveness:
            pass
        with liveness:
            assert liveness.allowed_s == allowed_s, "the outer call is neither work nor a wait that ended"


def test_a_large_transfer_may_take_longer() -> None:
    liveness = Liveness(stall_timeout_s=10)
    with liveness.call(num_bytes=100 << 20):
        assert liveness.allowed_s == pytest.approx(110, rel=0.1)
    with liveness:
        assert liveness.allowed_s == pytest.approx(10, rel=0.1)


def test_the_error_names_rank_host_and_where_it_may_be() -> None:
    liveness = Liveness(stall_timeout_s=7)
    with liveness:
        phase("before")
    phase("reading")
    phase("local step")
    phase("header")
    liveness._hosts = ("h1", "h2")
    with liveness:
        error = liveness.error("rank 0 of 2 (h1)", {1: ""})
    assert error.missing == (1,)
    assert str(error) == (
        "rank 0 of 2 (h1) waits in: header. Rank 1 (h2), in: before, reading, local step or header, made no "
        "progress for 7 s. Find out what stopped it; if a healthy rank may be silent for longer, raise "
        "sync.stall_timeout_s."
    )


def test_what_a_rank_is_seen_to_do_counts_more_than_where_it_may_be() -> None:
    error = Liveness(stall_timeout_s=7).error("rank 0 of 3", {2: "reduce"})
    assert "Rank 2, in: reduce, made no progress" in str(error)


def test_without_signs_no_rank_is_named() -> None:
    error = Liveness().error("rank 0 of 3")
    assert error.missing == ()
    assert "It is not known which rank made no progress for 300 s" in str(error)


def test_a_rank_alone_has_no_signs(tmp_path: Path) -> None:
    liveness = Liveness()
    liveness.share(0, ["h1"], tmp_path, "token")
    assert not liveness.sees_signs
    assert liveness.hooks == 0


def test_hosts_without_a_folder_see_no_signs() -> None:
    liveness = Liveness()
    liveness.share(0, ["h1", "h2"], None, "token")
    assert not liveness.sees_signs


def test_short_rounds_write_one_sign(tmp_path: Path) -> None:
    liveness = Liveness(stall_timeout_s=3600)
    liveness.share(0, ["h1", "h2"], tmp_path, "token")
    (sign,) = (tmp_path / ".hvd_train-signs-token").iterdir()
    first = sign.read_bytes()
    for _ in range(100):
        mark()
        with liveness:
            pass
    assert liveness.sees_signs
    assert sign.read_bytes() == first
    liveness.stop_sharing()
    assert signs_of(tmp_path) == []


def test_a_rank_in_one_place_for_long_writes_more_signs(tmp_path: Path) -> None:
    liveness = Liveness(stall_timeout_s=0.2)
    liveness.share(0, ["h1", "h2"], tmp_path / "runs", "token")
    (sign,) = (tmp_path / "runs/.hvd_train-signs-token").iterdir()
    first, deadline = sign.read_bytes(), Deadline(60)
    while sign.read_bytes() == first:
        assert not deadline.passed(), "no further sign was written"
        time.sleep(0.01)
    liveness.stop_sharing()
    assert signs_of(tmp_path / "runs") == []


def test_signs_are_seen_where_each_rank_leaves_one(tmp_path: Path) -> None:
    here, there = Liveness(), Liveness()
    here.share(0, ["h1", "h2"], tmp_path, "token")
    assert not here.sees_all(), "rank 1 has another folder, or none"
    there.share(1, ["h1", "h2"], tmp_path, "token")
    assert here.sees_all()
    assert there.sees_all()
    here.stop_sharing()
    there.stop_sharing()
    assert not here.sees_all()
    assert signs_of(tmp_path) == []


def test_an_end_removes_the_signs_of_all_ranks(tmp_path: Path) -> None:
    liveness = Liveness()
    liveness.share(0, ["h1", "h2"], tmp_path, "token")
    folder = tmp_path / ".hvd_train-signs-token"
    (folder / "rank-00001").write_text("of another rank")
    liveness.discard()
    assert not folder.exists()


def test_old_signs_of_killed_jobs_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("old", 100_000), ("new", 10)):
        folder = tmp_path / f".hvd_train-signs-{name}"
        folder.mkdir()
        (folder / "rank-00000").touch()
        for path in (folder / "rank-00000", folder):
            os.utime(path, (time.time() - age_s,) * 2)
    liveness = Liveness()
    liveness.share(0, ["h1", "h2"], tmp_path, "token")
    liveness.stop_sharing()
    assert [path.name for path in signs_of(tmp_path)] == [".hvd_train-signs-new"]
