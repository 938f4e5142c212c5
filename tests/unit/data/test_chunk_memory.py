"""Chunks of any shape are read in bounded memory."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.rows import Rows
from tests.launching import run
from tests.unit.data.chunked import MIB, NAMES, inputs_of, rows_of, write


def traced_peak(path: Path, reading: str, size: int = 64) -> int:
    tracemalloc.start()
    try:
        rows = rows_of(path)
        reader = make_reader(rows.spans, DataConfig(reading=reading), 0, rows.fields, 0)  # type: ignore[arg-type]
        for epoch in (0, 1):
            reader.start_epoch(epoch)
            while reader.next_batch(size) is not None:
                pass
        reader.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("chunks", "windows_bytes", "held_bytes", "compression"),
    [
        (None, 64, 0, None),
        ((64, 1024), 64, 0, None),
        ((60_000, 8), 64, 1, None),
        ((60_000, 1024), 64, 0, None),
        ((2048, 1024), 64, 4, "gzip"),
        ((1875, 64), 64, 4, "gzip"),
        ((10_000, 1024), 256, 20, "gzip"),
    ],
)
def test_memory_of_a_stream_is_bounded(
    chunks: tuple[int, int] | None,
    windows_bytes: int,
    held_bytes: int,
    compression: str | None,
    tmp_path: Path,
) -> None:
    """numpy's; HDF5 has a cache of at most 1 MiB a dataset, and the chunk that it decodes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(
            "inputs", (60_000, 1024), "u2", chunks=chunks, compression=compression
        )  # all zeros
        file["targets"] = np.arange(60_000, dtype="i4")
    assert traced_peak(tmp_path / "a.h5", "stream") < (windows_bytes + held_bytes + 8) * MIB


def test_memory_of_rows_in_memory_is_that_of_the_rows(tmp_path: Path) -> None:
    for chunks in ((20_000, 1), (20_000, 512), (7000, 512)):
        for compression in (None, "gzip"):
            with h5py.File(tmp_path / "a.h5", "w") as file:
                file.create_dataset("inputs", (20_000, 512), "u2", chunks=chunks, compression=compression)
                file["targets"] = np.arange(20_000, dtype="i4")
            part = 20_000 * (1024 + 4 + 16)
            assert traced_peak(tmp_path / "a.h5", "memory") < part + 4 * MIB


EPOCH = """
import sys
from hvd_train.data.deal import Span, split_validation
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows

info = read_info(sys.argv[1], plain(("inputs", "targets")))
train, _ = split_validation([Span(info.path, 0, info.num_samples)], 0.1)
reader = {"memory": MemoryReader, "stream": StreamReader}[sys.argv[2]](Rows(train, info.fields), 0)
while reader.next_batch(64) is not None:
    pass
reader.close()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_of_a_process_that_reads(tmp_path: Path) -> None:
    """With what HDF5 allocates: all rows, or rows twice, would be far more than the windows."""
    inputs = (np.arange(50_000)[:, None] % 7 + np.arange(1024) % 11).astype("u2")  # 98 MiB

    def peak(reading: str, **options: Any) -> int:
        path = write(tmp_path / "a.h5", inputs, **options)
        job = run([sys.executable, "-c", EPOCH, str(path), reading], deadline_s=60)
        path.unlink()
        return int(job.stdout)

    contiguous = peak("stream")
    for chunks, compression in (((50_000, 16), None), ((50_000, 1024), None), ((2048, 256), "lzf")):
        assert peak("stream", chunks=chunks, compression=compression) < 1.4 * contiguous, chunks
    contiguous = peak("memory")
    for chunks, compression in (((50_000, 16), None), ((50_000, 16), "lzf"), ((2048, 256), "lzf")):
        assert peak("memory", chunks=chunks, compression=compression) < 1.8 * contiguous, chunks


def test_rows_of_many_files_hold_no_more_than_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(3000, 300)  # 3.4 MiB
    spans = [
        Span(str(write(tmp_path / f"{i}.h5", inputs + i, (3000, 300), compression="gzip")), 0, 3000)
        for i in range(5)
    ]
    monkeypatch.setattr("hvd_train.data.rows._MOST_HELD_BYTES", 8 * MIB)
    tracemalloc.start()
    try:
        rows = Rows(spans, read_info(spans[0].shard, plain(NAMES)).fields)
        for _ in range(2):
            for start in range(0, len(rows), 1000):
                part = np.arange(start, start + 100)
                expected = inputs[part % 3000] + (part // 3000)[:, None]
                np.testing.assert_array_equal(rows.read(start, start + 100)["inputs"], expected)
        peak = tracemalloc.get_traced_memory()[1]
        rows.close()
    finally:
        tracemalloc.stop()
    assert peak < 10 * MIB


def test_auto_counts_the_memory_that_decoding_takes(tmp_path: Path) -> None:
    inputs = inputs_of(3000, 300)
    path = write(tmp_path / "a.h5", inputs, (3000, 300), compression="gzip")
    rows = rows_of(path)
    need = 3000 * (1200 + 8 + 16) + 4 * inputs.nbytes
    for budget, mode in ((need, "memory"), (need - 1, "stream")):
        reader = make_reader(rows.spans, DataConfig(), 0, rows.fields, budget)
        assert reader.mode == mode
        reader.close()
