"""Chunks of any shape are read right, and decoded about once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.deal import Span, split_validation
from hvd_train.data.hdf5 import file as hdf5_file
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.layout import HELD_BYTES, Layout
from hvd_train.data.places import plain
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS
from hvd_train.errors import DataError
from tests.unit.data.chunked import MIB, NAMES, drain, inputs_of, rows_of, write
from tests.unit.data.counting import CountingFile, CountingFilter, opening


@pytest.fixture(scope="module")
def counter() -> Iterator[CountingFilter]:
    counter = CountingFilter()
    yield counter
    counter.close()


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
    rows = Rows(train, read_info(path, plain(NAMES)).fields)
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
            rows = Rows(spans, read_info(path, plain(NAMES)).fields)
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
    rows = Rows(train, read_info(path, plain(NAMES)).fields)
    counter.decoded = 0
    reader = MemoryReader(rows, 0)
    reader.open()
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
    rows = rows_of(path)
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
    reader = StreamReader(Rows(train, read_info(path, plain(NAMES)).fields), 0)
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
        with ShardFile(path, plain(NAMES)) as file:
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


def test_the_same_dataset_under_two_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("inputs", data=inputs_of(6000, 100), chunks=(6000, 1))
        file["targets"] = h5py.SoftLink("/inputs")
    info = read_info(tmp_path / "a.h5", plain(NAMES))
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
