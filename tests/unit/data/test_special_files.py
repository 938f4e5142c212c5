"""A pipe, a socket or a device in the place of a file is refused at once: nothing waits for its other end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.sources import load_npz, read_idx
from hvd_train.errors import DataError
from tests.deadlines import calibration
from tests.unit.data.shards import write_foreign

pytestmark = pytest.mark.timeout(60 * calibration())  # opening a pipe would wait for ever

KINDS = {"fifo": r"a named pipe \(FIFO\)", "socket": "a socket", "device": "a character device"}


@pytest.fixture(params=list(KINDS))
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[Path], Path], str]]:
    """A function that puts a special file at a path, and what it is."""
    sockets = []

    def put(path: Path) -> Path:
        if request.param == "fifo":
            os.mkfifo(path)
        elif request.param == "socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(os.path.relpath(path))
        else:
            path.symlink_to("/dev/zero")
        return path

    yield put, KINDS[request.param]
    for opened in sockets:
        opened.close()


Place = tuple[Callable[[Path], Path], str]


def test_as_a_shard(tmp_path: Path, place: Place) -> None:
    put, kind = place
    write_foreign(tmp_path / "a.h5", 10)
    put(tmp_path / "b.h5")
    for path in (str(tmp_path), str(tmp_path / "*.h5"), str(tmp_path / "b.h5")):
        with pytest.raises(DataError, match=rf"b\.h5: is {kind}\. Expected an HDF5 file"):
            open_catalog(DataConfig(path=path))
        (problem,) = check_shard(locate(path, "PATH").train[-1], plain(("inputs", "targets"))).problems
        assert "Expected an HDF5 file: name a regular file" in problem


def test_as_a_manifest(tmp_path: Path, place: Place) -> None:
    put, kind = place
    write_foreign(tmp_path / "a.h5", 10)
    put(tmp_path / "manifest.json")
    with pytest.raises(DataError, match=rf"manifest\.json: is {kind}\. Expected the list of shards"):
        open_catalog(DataConfig(path=str(tmp_path)))


def test_as_a_source(tmp_path: Path, place: Place) -> None:
    put, kind = place
    with pytest.raises(DataError, match=rf"a\.npz: is {kind}\. Expected a \.npz file"):
        load_npz(put(tmp_path / "a.npz"))
    with pytest.raises(DataError, match=rf"idx: is {kind}\. Expected an idx file"):
        read_idx(put(tmp_path / "idx"))


def test_a_folder_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.h5").mkdir()
    np.savez(tmp_path / "a.npz", inputs=np.zeros(3), targets=np.zeros(3))
    with pytest.raises(DataError, match=r"b\.h5: is a folder\. Expected a \.npz file"):
        load_npz(tmp_path / "b.h5")
    assert len(load_npz(tmp_path / "a.npz").inputs) == 3
