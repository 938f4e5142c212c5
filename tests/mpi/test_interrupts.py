"""Ctrl-C while a command loads its libraries: it ends by the signal, quietly, with all that it started."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.deadlines import seconds
from tests.launching import ROOT, assert_nothing_is_left, command, members, send, start, wait_for

LISTENING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
"""Has a program listen to SIGINT though the tests may run in the background, where shells ignore it."""

SLOW = """
import os, time
open(os.path.join({folder!r}, "loading-%d" % os.getpid()), "w").close()
time.sleep(300)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A folder for libraries that never have been loaded."""
    (tmp_path / "libraries").mkdir()
    return tmp_path


def never_loads(folder: Path, library: str) -> dict[str, str]:
    """The environment in which a library is being loaded for ever, and says so by a file in `folder`."""
    (folder / "libraries" / f"{library}.py").write_text(SLOW.format(folder=str(folder)))
    return {"PYTHONPATH": os.pathsep.join([str(folder / "libraries"), str(ROOT)])}


def loading(folder: Path) -> list[int]:
    return [int(file.name.partition("-")[2]) for file in folder.glob("loading-*")]


@pytest.mark.parametrize(
    ("args", "library"),
    [
        ([], "tyro"),
        ([], "torch"),
        (["launch", "-np", "2"], "tyro"),
        (["shard", "info", "a.h5"], "h5py"),
        (["doctor"], "torch"),  # in a child, which is not of the terminal's group
        (["bench", "allreduce"], "torch"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "train",
)
def test_it_ends_by_the_signal_without_a_traceback(args: list[str], library: str, slow: Path) -> None:
    line = [sys.executable, "-c", LISTENING, "-m", "hvd_train", *args]
    with start(line, cwd=slow, env=never_loads(slow, library)) as process:
        wait_for(lambda: bool(loading(slow)), 60, process)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=seconds(60))
        assert process.returncode == -signal.SIGINT, out + said
        assert "Traceback" not in said
        assert_nothing_is_left(process, 10)


@pytest.mark.mpi
def test_every_rank_does(slow: Path) -> None:
    line = command("mpirun", 2, ["-c", LISTENING, "-m", "hvd_train"])
    with start(line, cwd=slow, env=never_loads(slow, "torch")) as process:
        wait_for(lambda: len(loading(slow)) == 2, 90, process)
        send(set(loading(slow)) & set(members(process.mark)), signal.SIGINT)
        out, said = process.communicate(timeout=seconds(60))
        assert process.returncode not in (0, 1), out + said
        assert "Traceback" not in out + said
        assert_nothing_is_left(process, 10)
