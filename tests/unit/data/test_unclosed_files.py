"""Files that a program writes, or that it was killed with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.places import plain
from hvd_train.tools.shard import main
from tests.deadlines import seconds
from tests.launching import run
from tests.unit.data.recipes import hdf5_tool, refusal
from tests.unit.data.shards import inputs_of, write_foreign

NAMES = ("inputs", "targets")
WRITER = """
import sys, h5py, numpy as np
from tests.unit.data.shards import inputs_of
path, libver = sys.argv[1:]
file = h5py.File(path, "w", libver=libver if libver != "default" else None)
inputs = file.create_dataset("inputs", (0, 3), "f4", chunks=(100, 3), maxshape=(None, 3), compression="gzip")
targets = file.create_dataset("targets", (0,), "i8", chunks=(100,), maxshape=(None,))
for rows in (1000, 3000):
    inputs.resize(rows, 0), targets.resize(rows, 0)
    inputs[:], targets[:] = inputs_of(0, rows), np.arange(rows) % 7
    if rows == 1000:
        file.flush()
print("written", flush=True)
sys.stdin.read()
"""
"""Rows 0 to 999 are flushed, rows 1000 to 2999 are not."""
MARKED = (
    "marked as being written: a program writes it now, or was killed before it closed it. Expected a "
    "complete HDF5 file: wait for that program. If it was killed, remove the mark by `h5clear --status "
    "--increment=0 FILE`; the file then has the rows of the last flush."
)


def writer(path: Path, libver: str) -> subprocess.Popen[str]:
    """A program that has the file open, and has written to it."""
    command = [sys.executable, "-c", WRITER, str(path), libver]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


@pytest.mark.parametrize("libver", ["latest", "v110"])
def test_a_file_that_is_marked_as_being_written(
    tmp_path: Path, libver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.h5"
    with writer(path, libver) as process:
        assert refusal(path) == f"{path}: {MARKED}"
        process.kill()
        process.wait(seconds(60))
    assert refusal(path) == f"{path}: {MARKED}"
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr() == (f"{path}: not supported\n", f"{path}: {MARKED}\n")
    subprocess.run([hdf5_tool("h5clear"), "--status", "--increment=0", path], check=True)
    with ShardFile(path, plain(NAMES)) as file:
        rows = file.read("inputs", 0, file.info.num_samples)
    assert len(rows) in (1000, 3000), "HDF5 may write more than was flushed"
    np.testing.assert_array_equal(rows, inputs_of(0, len(rows)))


def test_a_file_that_was_closed_after_all(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with writer(path, "latest") as process:
        assert refusal(path) == f"{path}: {MARKED}"
        process.communicate("", timeout=seconds(60))
    with ShardFile(path, plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 3000), inputs_of(0, 3000))


def test_a_killed_writer_of_the_default_format_leaves_the_last_flush(tmp_path: Path) -> None:
    """That format has no mark."""
    path = tmp_path / "a.h5"
    with writer(path, "default") as process:
        process.kill()
        process.wait(seconds(60))
    with ShardFile(path, plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 1000), inputs_of(0, 1000))


def test_a_lock_that_the_environment_asks_for(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 40)
    command = [sys.executable, "-m", "hvd_train", "shard", "check", str(path)]
    with h5py.File(path, "r+", locking=True):
        locked, unlocked = (
            run(command, env={**os.environ, "HDF5_USE_FILE_LOCKING": value}, deadline_s=60)
            for value in ("TRUE", "FALSE")
        )
    assert (locked.returncode, locked.stdout) == (1, f"{path}: not supported\n")
    assert "unable to lock file" in locked.stderr
    assert locked.stderr.endswith(
        "HDF5_USE_FILE_LOCKING asks for a lock: a program writes the file, or its file system has no locks. "
        "Wait for that program, or set HDF5_USE_FILE_LOCKING=FALSE.\n"
    )
    assert (unlocked.returncode, unlocked.stdout) == (0, f"{path}: good\n")
