"""A file that another program replaces or changes in length while rows of it are read; one that may not be
read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.crash import in_child
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.manifest import load_manifest
from hvd_train.data.places import plain
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError

ROWS = 4000
OPTIONS = [{}, {"chunks": (50, 64), "compression": "gzip"}]
REPLACED = (
    "PATH: the file was replaced after the run began, or this host sees another one under its name. Restore "
    "the file that the run began with, or start a new run."
)


def write(path: Path, value: float, rows: int = ROWS, **options: object) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=np.full((rows, 64), value, "f4"), **options)
        file["targets"] = np.arange(rows) % 3
    return path


def rows_of(path: Path) -> Rows:
    catalog = open_catalog(DataConfig(path=str(path)))
    return Rows(catalog.train, catalog.sample.fields)


def drain(reader: StreamReader) -> None:
    while reader.next_batch(100) is not None:
        pass


def renamed_over(path: Path, rows: int = ROWS) -> None:
    write(path.with_name("new"), 2, rows).rename(path)


def shorter(path: Path) -> None:
    renamed_over(path, 3000)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def removed(path: Path) -> None:
    path.unlink()


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x" * 5000)


def touched(path: Path) -> None:
    os.utime(path, (1, 1))


def moved_with_its_time(path: Path) -> None:
    """As a copy that keeps the times."""
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


@pytest.mark.parametrize("options", OPTIONS, ids=["contiguous", "gzip"])
@pytest.mark.parametrize("change", [renamed_over, shorter, removed, grown, touched, moved_with_its_time])
def test_an_open_file_stays_what_it_was(
    tmp_path: Path, change: Callable[[Path], None], options: dict[str, object]
) -> None:
    rows = rows_of(write(tmp_path / "a.h5", 1, **options))
    rows.read(0, 100)
    change(tmp_path / "a.h5")
    assert (rows.read(100, ROWS)["inputs"] == 1).all()
    rows.close()


@pytest.mark.parametrize("options", OPTIONS, ids=["contiguous", "gzip"])
@pytest.mark.parametrize("change", [renamed_over, shorter])
def test_a_file_that_was_replaced_is_refused_when_it_is_opened_again(
    tmp_path: Path, change: Callable[[Path], None], options: dict[str, object]
) -> None:
    path = write(tmp_path / "a.h5", 1, **options)
    rows = rows_of(path)
    rows.read(0, 100)
    rows.close()  # as rows of many files are
    change(path)
    with pytest.raises(DataError) as refused:
        rows.read(100, ROWS)
    assert str(refused.value) == REPLACED.replace("PATH", str(path))


@pytest.mark.parametrize("change", [grown, touched, moved_with_its_time])
def test_a_file_with_the_same_rows_is_opened_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    rows = rows_of(write(tmp_path / "a.h5", 1))
    rows.read(0, 100)
    rows.close()
    change(tmp_path / "a.h5")
    assert (rows.read(100, ROWS)["inputs"] == 1).all()
    rows.close()


def test_rows_beyond_the_end_of_a_file_are_not_taken_as_zeros(tmp_path: Path) -> None:
    """HDF5 does so, without an error."""
    path = write(tmp_path / "a.h5", 1)
    size = path.stat().st_size
    rows = rows_of(path)
    reader = StreamReader(rows, 0, block_bytes=2640, window_blocks=4)
    assert reader.next_batch(10) is not None
    cut(path)
    with pytest.raises(DataError) as refused:
        drain(reader)
    reader.close()
    assert str(refused.value) == (
        f"{path}: {size // 2:,} bytes, but {size:,} when it was opened: it was shortened while it was read. "
        "Restore the file that the run began with, or start a new run."
    )
    with pytest.raises(DataError, match=r"a\.h5: .*truncated file: .*copy or write it again"):
        rows.read(0, 10)


@pytest.mark.parametrize("name", ["a.h5", "manifest.json"])
def test_a_file_that_this_user_may_not_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 1)
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)

    def read() -> None:
        if os.getuid() == 0:  # which may read everything
            os.seteuid(65534)
        if name == "manifest.json":
            load_manifest(tmp_path)
        else:
            read_info(path, plain(("inputs", "targets")))

    with pytest.raises(DataError) as refused:
        in_child(path, read)
    assert (
        str(refused.value)
        == {
            "a.h5": f"{path}: permission denied. Make the file readable for this user.",
            "manifest.json": f"{path}: cannot be read: Permission denied. Check the permissions.",
        }[name]
    )
