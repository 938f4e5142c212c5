"""Files that are there completely or not at all, also where a folder cannot be forced to disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.io import atomic
from hvd_train.io.atomic import refusal, replacing, sync
from hvd_train.tools.doctor import storage
from tests.deadlines import seconds
from tests.launching import ROOT, environment

SHIM = """
import errno, os, stat
_real = os.fsync
def fsync(fd):
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise OSError(errno.{code}, os.strerror(errno.{code}))
    return _real(fd)
os.fsync = fsync
"""
"""For a sitecustomize.py: a file system on which a folder cannot be synced."""

AT_WORK = """
from pathlib import Path
from hvd_train.io.atomic import replacing
from hvd_train.tools.doctor.storage import runs_folder
for i in range(3):
    with replacing(Path("file")) as path:
        path.write_text(str(i))
check = runs_folder(Path())
print(Path("file").read_text(), check.status, check.seen)
"""


def python(code: str, folder: Path, shim: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in `folder` under a shim."""
    (folder / "shim").mkdir()
    (folder / "shim" / "sitecustomize.py").write_text(SHIM.format(code=shim))
    path = os.pathsep.join([str(folder / "shim"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment({"PYTHONPATH": path}),
        capture_output=True,
        text=True,
        timeout=seconds(120),
        check=False,
    )


def test_the_body_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two"):
        with replacing(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
        assert path.read_text() == text

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        fail(temporary)
    assert (path.read_text(), os.listdir(tmp_path)) == ("two", ["file"])


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"
    with pytest.raises(OSError, match="File name too long"), replacing(tmp_path / ("n" * 256)) as temporary:
        temporary.write_text("x")
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_that_cannot_be_synced_is_no_error_and_a_disk_that_fails_is(tmp_path: Path) -> None:
    assert refusal(tmp_path) is None
    refused = refusal(Path("/proc"))  # its folders have no fsync
    assert refused is not None
    assert refused.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")


@pytest.mark.parametrize("code", ["EINVAL", "ENOTSUP", "ENOSYS", "EBADF"])
def test_one_warning_a_process_and_everything_works(code: str, tmp_path: Path) -> None:
    done = python(AT_WORK, tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 warning ")
    assert "which cannot force a folder or its files to disk" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if "cannot force it to disk" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"hvd_train: .: its file system cannot force it to disk: {os.strerror(getattr(errno, code))}."
    )


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_fails_stays_an_error(code: str, tmp_path: Path) -> None:
    done = python(
        "from hvd_train.io.atomic import sync; from pathlib import Path; sync(Path())", tmp_path, code
    )
    assert done.returncode == 1
    assert os.strerror(getattr(errno, code)) in done.stderr


def test_doctor_leaves_nothing_behind(tmp_path: Path) -> None:
    assert storage.runs_folder(tmp_path / "runs").status == "ok"
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_PIECE_BYTES", 7)
    marks: list[int] = []
    monkeypatch.setattr(atomic, "mark", lambda: marks.append(1))
    for size in (0, 1, 6, 7, 8, 22):
        marks.clear()
        content = bytes(range(size))
        atomic.write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
        assert len(marks) == -(-size // 7), "each piece is progress"
