"""Chunks that would be decoded many times are refused with a remedy that works."""

from __future__ import annotations

import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import places_of, plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError
from tests.launching import run
from tests.unit.data.chunked import MIB, NAMES, drain, inputs_of, rows_of, write
from tests.unit.data.recipes import hdf5_tool


def refused(path: Path) -> str:
    with pytest.raises(DataError) as refusal:
        StreamReader(rows_of(path), 0)
    return str(refusal.value)


def repack(message: str, folder: Path) -> Path:
    """Runs the command that a message gives."""
    line = message.split("`")[-2]
    assert line.startswith("h5repack ")
    assert line.endswith(" repacked.h5")
    program, *arguments = shlex.split(line)
    job = run([hdf5_tool(program), *arguments], cwd=folder, deadline_s=60)
    assert job.returncode == 0, job.output
    return folder / "repacked.h5"


def test_columns_that_are_compressed_are_refused_and_the_remedies_work(tmp_path: Path) -> None:
    inputs = (np.arange(40_000)[:, None] % 7 + np.arange(512) % 11).astype("f4")  # 78 MiB
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = write(folder / "a.h5", inputs, (40_000, 4), compression="gzip", compression_opts=1)
    message = refused(path)
    assert message == (
        f"{path}: dataset `inputs` is compressed in chunks of 40000x4 (160,000 values, 640,000 bytes). To "
        "read its rows in random order, 314 bytes have to be decoded for each byte that is used; expected at "
        "most 8. Either give --data.reading memory, if all rows of a rank fit into its memory, or write the "
        f"file in smaller chunks: `h5repack -l inputs:CHUNK=256x512 '{path}' repacked.h5`."
    )
    rows = rows_of(path)
    in_memory = make_reader(rows.spans, DataConfig(reading="memory"), 0, rows.fields, 0)
    assert len(drain(in_memory, inputs, 1000)) == 40_000
    in_memory.close()
    rows.require_in_order()  # each chunk twice
    repacked = repack(message, tmp_path)
    layout = read_info(repacked, plain(NAMES)).layouts["inputs"]
    assert (layout.chunk, layout.filtered) == ((256, 512), True)
    reader = StreamReader(rows_of(repacked), 0)
    assert sorted(drain(reader, inputs, 1000)) == list(range(40_000))
    reader.close()


def test_targets_in_one_compressed_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are held, as long as they are few; else both datasets are named."""
    inputs = inputs_of(300_000, 2)
    one = {"chunks": (300_000,), "compression": "gzip", "compression_opts": 1}
    path = write(tmp_path / "a.h5", inputs, None, one)
    reader = StreamReader(rows_of(path), 0)
    assert sorted(drain(reader, inputs, 5000)) == list(range(300_000))
    reader.close()
    with h5py.File(path, "w") as file:
        group = file.create_group("of group")
        group.create_dataset(
            "in puts", data=inputs, chunks=(300_000, 2), compression="gzip", compression_opts=1
        )
        file.create_dataset("targets", data=np.arange(300_000), **one)
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", 1 * MIB)
    monkeypatch.setattr("hvd_train.data.windows.HELD_BYTES", 1 * MIB)
    names = ("of group/in puts", "targets")
    rows = Rows([Span(str(path), 0, 300_000)], read_info(path, plain(names)).fields)
    with pytest.raises(
        DataError, match=r"dataset `of group/in puts` is compressed in chunks of 300000x2"
    ) as refusal:
        StreamReader(rows, 0)
    repacked = read_info(repack(str(refusal.value), tmp_path), plain(names))
    assert [layout.chunk for layout in repacked.layouts.values()] == [(65536, 2), (65536,)]
    StreamReader(Rows([Span(repacked.path, 0, 300_000)], repacked.fields), 0).close()


def test_rows_in_order_are_refused_where_they_would_be_decoded_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", MIB // 2)
    inputs = inputs_of(3000, 300)
    path = write(tmp_path / "a.h5", inputs, (3000, 300), compression="gzip")
    rows = rows_of(path)
    with pytest.raises(DataError) as refusal:
        rows.require_in_order()
    assert str(refusal.value) == (
        f"{path}: dataset `inputs` is compressed in chunks of 3000x300 (900,000 values, 3,600,000 bytes). To "
        "read its rows in order, each chunk has to be decoded 7 times; expected at most 4. Write the file in "
        f"smaller chunks: `h5repack -l inputs:CHUNK=256x300 {path} repacked.h5`."
    )
    rows_of(repack(str(refusal.value), tmp_path)).require_in_order()


def test_the_command_names_the_dataset_and_the_file_that_it_is_in(tmp_path: Path) -> None:
    """Not the field, and not the file with the link."""
    inputs = (np.arange(40_000)[:, None] % 7 + np.arange(512) % 11).astype("f4")
    write(tmp_path / "raw.h5", inputs, (40_000, 4), compression="gzip", compression_opts=1)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = h5py.ExternalLink("raw.h5", "/inputs")
        file["targets"] = np.arange(40_000)
    data = DataConfig(fields={"x": "image"}, inputs="x", follow_links=True)
    info = read_info(tmp_path / "a.h5", places_of(data))
    with pytest.raises(DataError) as refusal:
        StreamReader(Rows([Span(info.path, 0, 40_000)], info.fields), 0)
    assert f"`h5repack -l inputs:CHUNK=256x512 {tmp_path / 'raw.h5'} repacked.h5`" in str(refusal.value)
    repack(str(refusal.value), tmp_path).rename(tmp_path / "raw.h5")
    StreamReader(Rows([Span(info.path, 0, 40_000)], info.fields), 0).close()
