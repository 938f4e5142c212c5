"""Shards that are compressed: read back by whoever has the filter, and one message where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.check import check_shard
from hvd_train.data.hdf5 import filters
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError

NAMES = plain(("inputs", "targets"))
ROWS = 1000
INPUTS = np.repeat(np.arange(ROWS, dtype="f4")[:, None], 100, axis=1)
NUMBERS = {"gzip": 1, "lz4": 32004, "zstd": 32015, "blosc": 32001}


@pytest.mark.parametrize("compression", NUMBERS)
def test_compressed_shards_are_read_back(tmp_path: Path, compression: str) -> None:
    if compression != "gzip":
        pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
    write_part(tmp_path, Arrays(INPUTS, np.arange(ROWS) % 7), shards=2, compression=compression)
    first, second = locate(str(tmp_path), "PATH").train
    with ShardFile(second.path, NAMES) as shard:
        np.testing.assert_array_equal(shard.read("inputs", 0, 500), INPUTS[500:])
    assert check_shard(first, NAMES).problems == ()
    with h5py.File(first.path) as file:
        pipeline = file["inputs"].id.get_create_plist()
        found = [pipeline.get_filter(index)[0] for index in range(pipeline.get_nfilters())]
        assert NUMBERS[compression] in found
        assert file["inputs"].id.get_storage_size() < INPUTS[:500].nbytes / 4


@pytest.mark.parametrize("compression", ["lz4", "zstd", "blosc"])
def test_a_filter_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    monkeypatch.setattr(filters.h5py.h5z, "filter_avail", lambda _: False)
    with pytest.raises(DataError) as error:
        write_part(tmp_path, Arrays(INPUTS, np.arange(ROWS) % 7), compression=compression)
    assert str(error.value) == (
        f"--compression {compression}: the HDF5 filter {compression} (number {NUMBERS[compression]}) is not "
        "installed. Install it where the ranks run: `pip install hdf5plugin`."
    )
    assert list(tmp_path.iterdir()) == []
