"""Copies of shards on a disk of the host: equal to their files, of one job, and gone after it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import local_copy
from hvd_train.data.deal import Span
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.local_copy import PREFIX, copy, fitting, folder_of
from hvd_train.data.places import plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.rows import Rows
from hvd_train.errors import ConfigError, DataError
from hvd_train.io.held_folder import HeldFolder, remove_abandoned
from tests.launching import ROOT
from tests.unit.data.shards import row_numbers, write_foreign


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "a.h5", 50)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "local" / "disk"


def test_a_copy_is_equal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_copy, "_PIECE_BYTES", 1000)
    copy(str(source), tmp_path / "copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == source.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5", "copy.h5"}


def test_a_file_that_changes_meanwhile_leaves_no_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append() -> None:
        with source.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(local_copy, "mark", append)
    with pytest.raises(DataError) as caught:
        copy(str(source), tmp_path / "copy.h5")
    assert str(caught.value) == (f"{source}: the file changed while it was copied. Wait until it is written.")
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5"}


def test_a_copy_that_a_disk_changes_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(file: int, *_: int) -> None:
        os.pwrite(file, b"\xff", 100)

    monkeypatch.setattr(os, "posix_fadvise", damage)
    with pytest.raises(DataError) as caught:
        copy(str(source), tmp_path / "copy.h5")
    assert str(caught.value) == f"{source}: its copy in {tmp_path} is not equal. Check that disk."
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5"}


def test_the_last_that_holds_the_folder_removes_it(cache: Path) -> None:
    one = HeldFolder.make(cache, PREFIX)
    other = HeldFolder.hold(one.path)
    (one.path / "copy").write_text("rows")
    one.close()
    one.close()
    assert (one.path / "copy").read_text() == "rows"
    other.close()
    assert list(cache.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        HeldFolder.hold(one.path)


def test_what_a_killed_job_left_is_removed_and_nothing_else(cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from hvd_train.io.held_folder import HeldFolder\n"
        "folder = HeldFolder.make(Path(sys.argv[1]), 'hvd_train-cache-')\n"
        "(folder.path / 'copy.part').write_text('half')\n"
        "print(folder.path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(cache)],
        stdin=subprocess.PIPE,  # closed if this test ends early
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as job:
        assert job.stdout is not None
        left = Path(job.stdout.readline().strip())
        remove_abandoned(cache, PREFIX)
        assert (left / "copy.part").exists(), "its owner lives"
        job.send_signal(signal.SIGKILL)
    mine = HeldFolder.make(cache, PREFIX)
    begun, old, others = (cache / f"hvd_train-cache-{name}" for name in ("begun", "old", "x"))
    begun.mkdir()
    old.mkdir()
    os.utime(old, times=(time.time() - 700,) * 2)
    others.write_text("no folder")
    remove_abandoned(cache, PREFIX)
    assert set(cache.iterdir()) == {mine.path, begun, others}
    mine.close()


def test_a_folder_that_is_taken_for_abandoned_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job removes it between its making and its lock."""
    hold, count = HeldFolder.hold, iter(range(9))

    def interrupted(path: Path) -> HeldFolder:
        if next(count) == 0:
            shutil.rmtree(path)
        return hold(path)

    monkeypatch.setattr(HeldFolder, "hold", interrupted)
    folder = HeldFolder.make(cache, PREFIX)
    assert list(cache.iterdir()) == [folder.path]
    folder.close()


def test_files_are_chosen_by_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Space:
        f_bavail, f_frsize, f_blocks = 30, 100, 200

    monkeypatch.setattr(os, "statvfs", lambda _: Space)
    sizes = {"a": 900, "b": 1200, "c": 1100, "d": 0, "e": 1}  # 2,000 beside the reserve of 1,000
    assert fitting(sizes, tmp_path) == ["a", "c", "d"]


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRATCH_HERE", str(tmp_path))
    assert folder_of("$SCRATCH_HERE/x") == tmp_path / "x"
    with pytest.raises(ConfigError) as caught:
        folder_of("$NOT_SET_HERE/x")
    assert str(caught.value) == (
        "data.cache = '$NOT_SET_HERE/x': no such variable in the environment of the ranks. Set it where they "
        "run, or name a folder."
    )


def test_files_with_links_are_not_copied() -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(cache="/tmp", follow_links=True)
    assert str(caught.value) == (
        "data.cache = '/tmp': expected none with data.follow_links: a copy is without the files that it "
        "links to."
    )


@pytest.mark.parametrize("reading", ["memory", "mmap", "stream"])
def test_rows_come_from_the_copy_and_errors_name_the_file(reading: Any, source: Path, tmp_path: Path) -> None:
    span, fields = Span(str(source), 5, 45), read_info(source, plain(("inputs", "targets"))).fields
    where = tmp_path / "copy.h5"
    copy(str(source), where)
    rows = Rows([span], fields, copies={str(source): str(where)})
    assert rows.files() == [str(source)]
    source.unlink()
    reader = make_reader([span], DataConfig(reading=reading), 0, fields, 0, copies=rows.copies)
    began = reader.state_dict()
    batch = reader.next_batch(100)
    assert batch is not None
    assert sorted(row_numbers(batch)) == list(range(5, 45))
    assert reader.not_finite_since(began) == ""
    reader.close()
    os.truncate(where, 1000)
    with pytest.raises(DataError, match=rf"^{re.escape(f'{source}, copied to {where}: ')}"):
        rows.read(0, 3)
    where.unlink()
    with pytest.raises(DataError, match=rf"^{re.escape(f'{source}, copied to {where}: no such file')}"):
        rows.read(0, 3)
    assert np.all(batch["inputs"][:, 0] >= 5)
