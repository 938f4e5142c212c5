"""One job in a run's folder: who is refused, who takes over, and that never two train at once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hvd_train.errors import RunDirectoryError, RunTakenOver
from hvd_train.run.claim import NoClaim, take
from hvd_train.run.holder import Holder
from tests.deadlines import Deadline, seconds
from tests.launching import ROOT

HOLD = """
import sys
from pathlib import Path
from hvd_train.run.claim import take
from hvd_train.errors import RunDirectoryError
sys.stdin.readline()
try:
    claim = take(Path(sys.argv[1]))
    print("holds", claim.number, claim.took_over, flush=True)
except RunDirectoryError as error:
    print("refused", error, flush=True)
sys.stdin.readline()
"""

TURNS = """
import os, sys, time
from pathlib import Path
from hvd_train.run.claim import take
from hvd_train.errors import RunDirectoryError
from tests.deadlines import Deadline
folder, me = Path(sys.argv[1]), sys.argv[2]
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
deadline = Deadline(60)
turns = 0
while turns < 15 and not deadline.passed():
    try:
        claim = take(folder)
    except RunDirectoryError:
        time.sleep(0.002)
        continue
    os.write(log, f"begin {me}\\n".encode())
    claim.check()
    os.write(log, f"end {me}\\n".encode())
    turns += 1
    if turns == 15:
        os._exit(0)  # as if killed: the claim stays
    claim.release()
    time.sleep(0.001)
sys.exit(turns < 15)
"""


@contextmanager
def child(program: str, *arguments: str, begin: bool = True) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        if begin:
            start(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def foreign(**changes: Any) -> Holder:
    """A process on another host."""
    mine = Holder.this_process({})
    return dataclasses.replace(mine, **{"host": "elsewhere", "token": "theirs", "boot": "another", **changes})


def write(folder: Path, holder: Holder, number: int = 1) -> Path:
    path = folder / f".claim-{number}.json"
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return path


def claims(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".claim"))


def test_a_claim_is_released_and_the_next_has_the_next_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        with take(tmp_path) as claim:
            claim.check()
            assert (claim.number, claim.took_over) == (number, False)
            assert claims(tmp_path) == [f".claim-{number}.json"]
        claim.release()
        assert claims(tmp_path) == [f".claim-{number}.json"], "no number is used twice"
    assert capfd.readouterr().err == ""


def test_a_run_in_use_is_refused_with_host_process_and_time(tmp_path: Path) -> None:
    with child(HOLD, str(tmp_path)) as holder:
        assert answer(holder) == "holds 1 False"
        host = os.uname().nodename
        for send in (None, signal.SIGSTOP):  # a job that is stopped lives
            if send is not None:
                holder.send_signal(send)
            expected = (
                rf"^{tmp_path} is in use by process {holder.pid} on {host} \(since \d{{4}}-\S+ [\d:]+\); "
            )
            with pytest.raises(RunDirectoryError, match=expected):
                take(tmp_path)
        assert claims(tmp_path) == [".claim-1.json"]


def test_the_same_process_may_not_train_in_it_twice(tmp_path: Path) -> None:
    with take(tmp_path), pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()} "):
        take(tmp_path)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_job_is_replaced_at_once(
    reaped: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with child(HOLD, str(tmp_path)) as holder:
        assert answer(holder) == "holds 1 False"
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        if reaped:
            holder.wait()
        with take(tmp_path, stale_s=1e9) as claim:
            assert (claim.number, claim.took_over) == (2, True)
            assert claims(tmp_path) == [".claim-2.json"]
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1
        assert f"{tmp_path} is taken over from process {holder.pid} on" in said[0]
        assert said[0].endswith(", which has ended.")


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    mine = Holder.this_process({})
    # Later than this process: its parent cannot have begun then.
    write(tmp_path, dataclasses.replace(mine, pid=os.getppid(), start=mine.start + 1, token="theirs"))
    with take(tmp_path, stale_s=1e9) as claim:
        assert claim.took_over


@pytest.mark.parametrize(
    "elsewhere",
    [
        {},
        {"host": os.uname().nodename},
        {
            "host": os.uname().nodename,
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pids": "pid:[1]",
        },
    ],
    ids=["another host", "before a reboot", "another container"],
)
def test_a_claim_from_elsewhere_is_watched_before_it_is_taken_over(
    elsewhere: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, foreign(**elsewhere))
    began = time.monotonic()
    with take(tmp_path, stale_s=1.0) as claim:
        assert time.monotonic() - began >= 1.0
        assert claim.took_over
    waits, over = capfd.readouterr().err.splitlines()
    assert waits.endswith("Waiting 1 s for a sign of life from there.")
    assert f"process {os.getpid()} on " in waits
    assert over.endswith("which gave no sign of life for 1 s.")


def test_a_claim_from_elsewhere_that_is_renewed_is_in_use(tmp_path: Path) -> None:
    path, ended = write(tmp_path, foreign()), threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    beats = threading.Thread(target=renew)
    beats.start()
    try:
        with pytest.raises(RunDirectoryError, match=r"is in use by process \d+ on elsewhere"):
            take(tmp_path, stale_s=30)
    finally:
        ended.set()
        beats.join()


def test_a_holder_renews_its_claim(tmp_path: Path) -> None:
    with take(tmp_path, beat_s=0.01):
        path = tmp_path / ".claim-1.json"
        os.utime(path, (1, 1))
        deadline = Deadline(30)
        while path.stat().st_mtime < 2 and not deadline.passed():
            time.sleep(0.01)
        assert path.stat().st_mtime > 2


def test_a_claim_that_is_released_while_it_is_watched_is_free(tmp_path: Path) -> None:
    write(tmp_path, foreign())
    timer = threading.Timer(0.3, lambda: write(tmp_path, foreign(released=True)))
    timer.start()
    with take(tmp_path, stale_s=60) as claim:
        assert (claim.number, claim.took_over) == (2, False)
    timer.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_claim_is_watched_too(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".claim-7.json").write_bytes(content)
    with take(tmp_path, stale_s=0.1) as claim:
        assert (claim.number, claim.took_over) == (8, True)


@pytest.mark.parametrize(
    ("before", "now", "at_once"),
    [
        (("17", "0"), ("17", "1"), True),
        (("17", "1"), ("17", "3"), True),
        (("17", "1"), ("17", "1"), False),
        (("17", "2"), ("17", "1"), False),
        (("17", "0"), ("18", "1"), False),
        (("", "0"), ("", "1"), False),
    ],
)
def test_a_requeued_job_takes_over_from_its_earlier_start(
    before: tuple[str, str],
    now: tuple[str, str],
    at_once: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def slurm(job: str, restart: str) -> dict[str, str]:
        return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart, "SLURM_CLUSTER_NAME": "c"} if job else {}

    earlier = Holder.this_process(slurm(*before))
    write(tmp_path, dataclasses.replace(earlier, host="elsewhere", token="theirs"))
    with take(tmp_path, slurm(*now), stale_s=0.1) as claim:
        assert claim.took_over
    said = capfd.readouterr().err
    assert ("an earlier start of this job" in said) is at_once
    assert ("Waiting" in said) is not at_once


def test_job_numbers_of_other_clusters_are_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    earlier = Holder.this_process({"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "a"})
    write(tmp_path, dataclasses.replace(earlier, host="elsewhere"))
    take(
        tmp_path, {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "b", "SLURM_RESTART_COUNT": "1"}, stale_s=0.1
    ).release()
    assert "Waiting" in capfd.readouterr().err


def test_a_job_that_was_replaced_gets_an_error(tmp_path: Path) -> None:
    with take(tmp_path) as claim:
        claim.check()
        path = write(tmp_path, foreign(), 2)
        with pytest.raises(
            RunTakenOver, match=r"was taken over by process \d+ on elsewhere.*writes nothing more"
        ):
            claim.check()
        path.unlink()
        claim.check()
        (tmp_path / ".claim-1.json").unlink()
        with pytest.raises(RunTakenOver, match="by another job, or it was removed"):
            claim.check()
        claim.poll()  # the last look was just now
    assert claims(tmp_path) == []


def test_a_late_release_does_nothing_to_the_job_that_took_over(tmp_path: Path) -> None:
    first = take(tmp_path)
    write(tmp_path, foreign(), 2)
    (tmp_path / ".claim-1.json").unlink()
    first.release()
    assert claims(tmp_path) == [".claim-2.json"]


def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT and some network file systems."""

    def refuse(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with take(tmp_path) as claim:
        claim.check()
        assert claims(tmp_path) == [".claim-1.json"]
        with pytest.raises(RunDirectoryError, match="in use by process"):
            take(tmp_path)


def test_of_many_jobs_that_find_a_stale_claim_one_takes_over(tmp_path: Path) -> None:
    for dead in (True, False):
        folder = tmp_path / str(dead)
        folder.mkdir()
        if dead:
            write(folder, dataclasses.replace(Holder.this_process({}), start=1, token="theirs"))
        with ExitStack() as stack:
            jobs = [stack.enter_context(child(HOLD, str(folder), begin=False)) for _ in range(5)]
            for job in jobs:
                start(job)
            answers = sorted(map(answer, jobs))
            assert answers[0] == (f"holds {1 + dead} {dead}")
            assert all(a.startswith(f"refused {folder} is in use by process ") for a in answers[1:])


def test_never_two_at_once(tmp_path: Path) -> None:
    """Processes that take turns, some of which end without a release."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(child(TURNS, str(tmp_path), str(i), begin=False)) for i in range(4)]
        for job in jobs:
            _, said = job.communicate(timeout=seconds(90))
            assert job.returncode == 0, said
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert len(lines) == 4 * 15 * 2
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert (begin.split()[0], end.split()[0], begin.split()[1]) == ("begin", "end", end.split()[1])


def test_the_other_ranks_have_none() -> None:
    with NoClaim() as claim:
        claim.check()
        claim.poll()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        take(tmp_path / "nowhere")
    take(tmp_path).release()
