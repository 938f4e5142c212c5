"""Chunks of any shape are read in bounded memory and decoded about once, or refused with a remedy."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span, split_validation
from hvd_train.data.hdf5 import file as hdf5_file
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.layout import HELD_BYTES, Layout
from hvd_train.data.reader import MemoryReader, Reader, StreamReader, make_reader
from hvd_train.data.rows import Rows
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS
from hvd_train.errors import DataError
from tests.unit.data.counting import CountingFile, CountingFilter, opening

NAMES = ("inputs", "targets")
MIB = 1 << 20


@pytest.fixture(scope="module")
def counter() -> Iterator[CountingFilter]:
    counter = CountingFilter()
    yield counter
    counter.close()


def inputs_of(rows: int, *shape: int) -> npt.NDArray[np.float32]:
    """Every value is another one: its number, up to 2**24."""
    return (np.arange(rows * int(np.prod(shape))) % (1 << 24)).astype(np.float32).reshape(rows, *shape)


def write(
    path: Path, inputs: npt.NDArray[Any], chunks: Any = None, targets: Any = None, **options: Any
) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", data=inputs, chunks=chunks, **options)
        file.create_dataset("targets", data=np.arange(len(inputs)), **(targets or {}))
    return path


def rows_of(path: Path, *spans: tuple[int, int]) -> Rows:
    info = read_info(path, NAMES)
    return Rows([Span(str(path), *span) for span in spans or [(0, info.num_samples)]], info.fields)


def drain(reader: Reader, inputs: npt.NDArray[Any], size: int = 64) -> list[int]:
    """The rows of an epoch, each compared with what was written."""
    numbers: list[int] = []
    while (batch := reader.next_batch(size)) is not None:
        np.testing.assert_array_equal(batch["inputs"], inputs[batch["targets"]])
        numbers += batch["targets"].tolist()
    return numbers


SHAPES = {
    "columns": ((3000, 200), (3000, 1)),
    "column pairs over bands": ((3000, 200), (1700, 2)),
    "auto": ((3000, 600), (750, 75)),
    "tiles of a sample": ((200, 64, 64), (1, 16, 16)),
    "tiles of samples": ((200, 64, 64), (100, 15, 17)),
    "all": ((3000, 200), (3000, 200)),
    "beyond the rows": ((1000, 300), (2000, 300)),
    "single values": ((40, 30), (1, 1)),
    "rows": ((3000, 200), (64, 200)),
    "no values": ((40, 0), None),
}


@pytest.mark.parametrize(
    "options", [{}, {"compression": "gzip", "compression_opts": 1}], ids=["plain", "gzip"]
)
@pytest.mark.parametrize("case", SHAPES)
def test_any_rows_of_any_chunks(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    shape, chunks = SHAPES[case]
    inputs = inputs_of(*shape)
    resizable = {"maxshape": (None, *shape[1:])} if chunks else {}
    path = write(tmp_path / "a.h5", inputs, chunks, **(options | resizable if chunks else {}))
    n = shape[0]
    rows = rows_of(path, (3, n // 3), (n // 3 + 5, n // 2), (n // 2, n - 1))
    numbers = np.array([*range(3, n // 3), *range(n // 3 + 5, n - 1)])
    generator = np.random.default_rng(0)
    for _ in range(30):
        start, stop = sorted(generator.integers(0, len(rows) + 1, 2).tolist())
        batch = rows.read(start, stop)
        np.testing.assert_array_equal(batch["targets"], numbers[start:stop])
        np.testing.assert_array_equal(batch["inputs"], inputs[numbers[start:stop]])
    rows.close()


@pytest.mark.parametrize("chunks", [(3000, 1), (3000, 200), (100, 200), (1700, 30)])
def test_streams_cover_an_epoch_whatever_the_chunks(chunks: tuple[int, int], tmp_path: Path) -> None:
    inputs = inputs_of(3000, 200)
    path = write(tmp_path / "a.h5", inputs, chunks, compression="gzip", compression_opts=1)
    train, _ = split_validation([Span(str(path), 0, 3000)], 0.1)
    rows = Rows(train, read_info(path, NAMES).fields)
    expected = [row for span in train for row in range(span.start, span.stop)]
    for window_blocks in (2, WINDOW_BLOCKS):
        reader = StreamReader(rows, 0, window_blocks=window_blocks)
        assert sorted(drain(reader, inputs)) == expected
        reader.start_epoch(1)
        first = drain(reader, inputs)
        reader.start_epoch(1)
        assert drain(reader, inputs, 37) == first
        reader.close()


def test_batches_in_order_decode_each_chunk_once(counter: CountingFilter, tmp_path: Path) -> None:
    """Also where batches end in the middle of a chunk, rows are taken out of it, and ranks take turns."""
    inputs = inputs_of(4000, 300)
    for name, chunks in (
        ("all", (4000, 300)),
        ("some", (1000, 300)),
        ("columns", (4000, 20)),
        ("auto", (1500, 70)),
    ):
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            counter.create(file, "inputs", inputs, chunks)
            counter.create(file, "targets", np.arange(4000), (4000,))
        num_chunks = -(-4000 // chunks[0]) * -(-300 // chunks[1])
        train, validation = split_validation([Span(str(path), 0, 4000)], 0.1)
        for spans, first, step in (([Span(str(path), 0, 4000)], 0, 1), (train, 0, 1), (validation, 1, 3)):
            rows = Rows(spans, read_info(path, NAMES).fields)
            rows.require_in_order()
            counter.decoded = 0
            for start in range(64 * first, len(rows), 64 * step):
                rows.read(start, min(start + 64, len(rows)))
            rows.close()
            assert counter.decoded == num_chunks + 1, (name, spans[:2])


def test_memory_decodes_each_chunk_once(counter: CountingFilter, tmp_path: Path) -> None:
    """Though the rows are in many ranges, and a band is larger than what is held."""
    inputs = inputs_of(1000, 300)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        counter.create(file, "inputs", inputs, (1000, 1))
        counter.create(file, "targets", np.arange(1000), (1000,))
    train, _ = split_validation([Span(str(path), 0, 1000)], 0.1)
    rows = Rows(train, read_info(path, NAMES).fields)
    counter.decoded = 0
    reader = MemoryReader(rows, 0)
    assert counter.decoded == 300 + 1
    assert len(drain(reader, inputs)) == 900
    reader.close()


def test_what_is_too_large_to_hold_is_decoded_a_few_times(
    counter: CountingFilter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", 1 * MIB)
    inputs = inputs_of(3000, 300)  # 3.4 MiB
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        counter.create(file, "inputs", inputs, (3000, 300))
        file["targets"] = np.arange(3000)
    rows = rows_of(path)
    rows.require_in_order()
    counter.decoded = 0
    for start in range(0, 3000, 64):
        batch = rows.read(start, min(start + 64, 3000))
        np.testing.assert_array_equal(batch["inputs"], inputs[start : start + 64])
    assert counter.decoded == 4 == rows.info(rows.spans[0]).layouts["inputs"].decodes
    counter.decoded = 0
    np.testing.assert_array_equal(rows.read(0, 3000)["inputs"], inputs)
    assert counter.decoded == 1
    rows.close()
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", MIB // 2)
    with pytest.raises(DataError, match="each chunk has to be decoded 7 times; expected at most 4"):
        rows.require_in_order()


def test_a_stream_decodes_each_chunk_about_once_an_epoch(counter: CountingFilter, tmp_path: Path) -> None:
    inputs = inputs_of(20_000, 512)  # 39 MiB
    for chunks in ((4000, 512), (2500, 64), (500, 512), (1000, 512), (20_000, 512)):
        path = tmp_path / f"{chunks[0]}.h5"
        with h5py.File(path, "w") as file:
            counter.create(file, "inputs", inputs, chunks)
            counter.create(file, "targets", np.arange(20_000), (20_000,))
        for part in ((0, 20_000), (10, 19_990)):
            reader = StreamReader(rows_of(path, part), 0)
            counter.decoded = 0
            assert sorted(drain(reader, inputs)) == list(range(*part))
            reader.close()
            # And the first window of the next epoch, which the thread reads on: here all rows.
            num_chunks = 20_000 // chunks[0] * (512 // chunks[1])
            assert counter.decoded <= 2 * num_chunks + 2
        path.unlink()


def test_a_stream_decodes_each_chunk_once_though_validation_rows_are_cut_out(
    counter: CountingFilter, tmp_path: Path
) -> None:
    inputs = inputs_of(40_000, 1024)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        counter.create(file, "inputs", inputs, (4000, 1024))
        file["targets"] = np.arange(40_000)
    train, _ = split_validation([Span(str(path), 0, 40_000)], 0.1)
    reader = StreamReader(Rows(train, read_info(path, NAMES).fields), 0)
    counter.decoded = 0
    assert len(drain(reader, inputs)) == 36_000
    reader.close()
    assert 10 <= counter.decoded <= 20
    path.unlink()


def test_unfiltered_chunks_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(12_000, 100)
    files: list[CountingFile] = []
    monkeypatch.setattr(hdf5_file, "open_file", opening(files))
    for chunks, num_reads in (((12_000, 1), 100), ((12_000, 100), 1), ((8000, 10), 10)):
        path = write(tmp_path / "a.h5", inputs, chunks)
        with ShardFile(path, NAMES) as file:
            file.read("inputs", 0, 1)
            file.read("inputs", 100, 2721)  # the piece from 0 on, as it is held
            files[-1].sizes.clear()
            rows = file.read("inputs", 2621, 5242)
            np.testing.assert_array_equal(rows, inputs[2621:5242])
            assert len(files[-1].sizes) <= num_reads + 2, "and parts of the index"
            assert rows.nbytes <= sum(files[-1].sizes) <= rows.nbytes + 16_384


def test_the_order_of_small_chunks_and_of_contiguous_rows_is_as_ever(tmp_path: Path) -> None:
    """The digest of blocks and windows is what a checkpoint compares."""
    inputs = inputs_of(5000, 64)
    for chunks, expected in ((None, 992), ((100, 64), 900), ((1500, 64), 1500), ((2000, 1), 2000)):
        path = write(tmp_path / "a.h5", inputs, chunks)
        reader = StreamReader(rows_of(path, (30, 4990)), 0)
        bounds = [30, *range(expected, 4990, expected), 4990]
        assert (reader._blocks + 30).tolist() == [list(block) for block in pairwise(bounds)]
        reader.close()


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
from hvd_train.data.reader import MemoryReader, StreamReader
from hvd_train.data.rows import Rows

info = read_info(sys.argv[1], ("inputs", "targets"))
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
        command = [sys.executable, "-c", EPOCH, str(path), reading]
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120)
        path.unlink()
        return int(found.stdout)

    contiguous = peak("stream")
    for chunks, compression in (((50_000, 16), None), ((50_000, 1024), None), ((2048, 256), "lzf")):
        assert peak("stream", chunks=chunks, compression=compression) < 1.4 * contiguous, chunks
    contiguous = peak("memory")
    for chunks, compression in (((50_000, 16), None), ((50_000, 16), "lzf"), ((2048, 256), "lzf")):
        assert peak("memory", chunks=chunks, compression=compression) < 1.8 * contiguous, chunks


def refused(path: Path) -> str:
    with pytest.raises(DataError) as refusal:
        StreamReader(rows_of(path), 0)
    return str(refusal.value)


def repack(message: str, folder: Path) -> Path:
    """Runs the command that a message gives."""
    line = message.split("`")[-2]
    assert line.startswith("h5repack ")
    assert line.endswith(" repacked.h5")
    subprocess.run(shlex.split(line), cwd=folder, check=True, timeout=120)
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
    layout = read_info(repacked, NAMES).layouts["inputs"]
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
    rows = Rows([Span(str(path), 0, 300_000)], read_info(path, names).fields)
    with pytest.raises(
        DataError, match=r"dataset `of group/in puts` is compressed in chunks of 300000x2"
    ) as refusal:
        StreamReader(rows, 0)
    repacked = read_info(repack(str(refusal.value), tmp_path), names)
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


def test_auto_counts_the_memory_that_decoding_takes(tmp_path: Path) -> None:
    inputs = inputs_of(3000, 300)
    path = write(tmp_path / "a.h5", inputs, (3000, 300), compression="gzip")
    rows = rows_of(path)
    need = 3000 * (1200 + 8 + 16) + 4 * inputs.nbytes
    for budget, mode in ((need, "memory"), (need - 1, "stream")):
        reader = make_reader(rows.spans, DataConfig(), 0, rows.fields, budget)
        assert reader.mode == mode
        reader.close()


def test_rows_of_many_files_hold_no_more_than_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(3000, 300)  # 3.4 MiB
    spans = [
        Span(str(write(tmp_path / f"{i}.h5", inputs + i, (3000, 300), compression="gzip")), 0, 3000)
        for i in range(5)
    ]
    monkeypatch.setattr("hvd_train.data.rows._MOST_HELD_BYTES", 8 * MIB)
    tracemalloc.start()
    try:
        rows = Rows(spans, read_info(spans[0].shard, NAMES).fields)
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


def test_the_same_dataset_under_two_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("inputs", data=inputs_of(6000, 100), chunks=(6000, 1))
        file["targets"] = h5py.SoftLink("/inputs")
    info = read_info(tmp_path / "a.h5", NAMES)
    batch = Rows([Span(info.path, 0, 6000)], info.fields).read(5, 70)
    np.testing.assert_array_equal(batch["inputs"], batch["targets"])
    np.testing.assert_array_equal(batch["inputs"], inputs_of(6000, 100)[5:70])


def test_layouts() -> None:
    rows = Layout(shape=(60_000, 1024), itemsize=4, chunk=(64, 1024), filtered=True)
    assert (rows.band_chunks, rows.band_bytes, rows.is_large, rows.decodes) == (1, 64 * 4096, False, 1)
    columns = Layout(shape=(60_000, 1024), itemsize=4, chunk=(60_000, 1), filtered=True)
    assert (columns.band_chunks, columns.band_bytes, columns.is_large) == (1024, 60_000 * 4096, True)
    assert (columns.held_rows, columns.decodes) == (HELD_BYTES // 4096, 4)
    assert columns.suggested_chunk() == (128, 1024)
    images = Layout(shape=(7, 3, 512, 512), itemsize=4, chunk=(7, 1, 512, 512), filtered=True)
    assert images.suggested_chunk() == (1, 3, 512, 512)
    # Chunks of one row, however large, are decoded with their row only.
    row = Layout(shape=(50, 3, 4096, 4096), itemsize=4, chunk=(1, 3, 4096, 4096), filtered=True)
    assert (row.is_large, row.cache_bytes) == (False, MIB)
    singles = Layout(shape=(10, 100, 100), itemsize=4, chunk=(1, 1, 1))
    boxes = list(singles.boxes(4096))
    assert [box[0] for box in boxes] == [slice(0, 40), slice(40, 80), slice(80, 100)]
    assert [box[1] for box in boxes] == 3 * [slice(0, 100)]
    assert [list(Layout(shape=shape, itemsize=4).boxes(1)) for shape in ((5,), (5, 3))] == [
        [()],
        [(slice(0, 3),)],
    ]
    assert BLOCK_BYTES * WINDOW_BLOCKS == 32 * MIB
