"""One contract for every reader: each row once an epoch, in an order that can be repeated and resumed."""

from __future__ import annotations

import json
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.deal import Span
from hvd_train.data.finite import first_not_finite
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.places import plain
from hvd_train.data.readers.ahead import ReadsAhead
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.mmap import MmapReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError
from tests.deadlines import seconds
from tests.unit.data.shards import row_numbers, write_foreign

FIELDS = {"inputs": FieldSpec(shape=(3,), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}
ROW_BYTES = 20
ORDER_BYTES = 16
"""What a row's place in two orders takes: that of an epoch, and the one before while it is made."""

Make = Callable[[Rows, int], Reader]

# Blocks of 4 rows and windows of 3 blocks: 53 rows are many windows, some ending within a batch.
small_stream = partial(StreamReader, block_bytes=4 * ROW_BYTES, window_blocks=3)


def ahead(rows: Rows, seed: int) -> Reader:
    """Every batch is gathered ahead, in sizes that some of the tests ask for."""
    return ReadsAhead(small_stream(rows, seed), 8, worthwhile_s=0)


@pytest.fixture(
    params=[MemoryReader, MmapReader, StreamReader, small_stream, ahead],
    ids=["memory", "mmap", "stream", "stream-small", "ahead"],
)
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def spans(tmp_path: Path) -> list[Span]:
    """Rows 0-29 and 100-122: of two files, one chunked, the second from its tenth row on."""
    one = write_foreign(tmp_path / "one.h5", 30)
    two = write_foreign(tmp_path / "two.h5", 60, first=90, chunks=None)
    three = write_foreign(tmp_path / "three.h5", 13, first=200)
    return [Span(str(one), 0, 30), Span(str(two), 10, 20), Span(str(three), 0, 13)]


EXPECTED = sorted([*range(30), *range(100, 110), *range(200, 213)])


def drain(reader: Reader, size: int = 8) -> list[int]:
    numbers: list[int] = []
    while (batch := reader.next_batch(size)) is not None:
        numbers += row_numbers(batch)
    return numbers


@pytest.mark.parametrize("size", [1, 7, 53, 60])
def test_every_row_once_an_epoch_and_only_the_last_batch_smaller(
    make: Make, spans: list[Span], size: int
) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    assert reader.num_samples == 53
    for epoch in (0, 1, 5):
        reader.start_epoch(epoch)
        batches = []
        while (batch := reader.next_batch(size)) is not None:
            batches.append(row_numbers(batch))
        assert sorted(row for batch in batches for row in batch) == EXPECTED
        assert all(len(batch) == size for batch in batches[:-1])
        assert len(batches[-1]) == 53 - size * (len(batches) - 1)
        assert reader.next_batch(size) is None
    reader.close()


def test_order_is_a_function_of_seed_epoch_and_part(make: Make, spans: list[Span]) -> None:
    def order(seed: int, epoch: int, part: list[Span]) -> list[int]:
        reader = make(Rows(part, FIELDS), seed)
        reader.start_epoch(epoch)
        numbers = drain(reader)
        reader.close()
        return numbers

    first = order(3, 2, spans)
    assert order(3, 2, spans) == first
    assert first != EXPECTED
    assert order(3, 1, spans) != first
    assert order(4, 2, spans) != first
    assert order(3, 2, spans[::-1]) != first


def test_order_does_not_depend_on_batch_size_or_on_what_was_read_before(
    make: Make, spans: list[Span]
) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    reader.start_epoch(1)
    expected = drain(reader, 5)
    reader.start_epoch(3)
    reader.next_batch(20)
    reader.start_epoch(1)
    assert drain(reader, 9) == expected
    reader.close()


def test_a_new_reader_stands_at_the_start_of_epoch_0(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    unasked = drain(reader)
    reader.start_epoch(0)
    assert drain(reader) == unasked
    reader.close()


def test_it_resumes_exactly_from_every_position(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 1)
    reader.start_epoch(2)
    order = drain(reader)
    reader.start_epoch(3)
    following = drain(reader)
    for position in range(54):
        reader.start_epoch(2)
        if position:
            reader.next_batch(position)
        state = json.loads(json.dumps(reader.state_dict()))
        resumed = make(Rows(spans, FIELDS), 1)
        resumed.load_state_dict(state)
        assert not resumed.restarted
        assert resumed.state_dict() == state
        assert drain(resumed) == order[position:]
        resumed.start_epoch(3)
        if position % 10 == 0:
            assert drain(resumed) == following
        resumed.close()
    reader.close()


def test_state_is_json_scalars(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    reader.next_batch(5)
    state = reader.state_dict()
    assert {type(value) for value in state.values()} <= {int, str, float, bool}
    assert (state["epoch"], state["position"]) == (0, 5)
    reader.close()


def test_state_of_another_part_restarts_its_epoch(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    reader.start_epoch(4)
    reader.next_batch(11)
    state = reader.state_dict()
    reader.close()
    other = make(Rows(spans[:2], FIELDS), 0)
    other.load_state_dict(state)
    assert other.restarted
    assert (other.state_dict()["epoch"], other.state_dict()["position"]) == (4, 0)
    assert len(drain(other)) == 40
    other.load_state_dict(other.state_dict())
    assert not other.restarted
    other.close()
    other_seed = make(Rows(spans, FIELDS), 9)
    other_seed.load_state_dict(state)
    assert other_seed.restarted
    other_seed.close()


def test_data_moved_to_another_folder_is_the_same_part(make: Make, spans: list[Span], tmp_path: Path) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    reader.next_batch(11)
    state, rest = reader.state_dict(), drain(reader)
    reader.close()
    moved = []
    for span in spans:
        (tmp_path / "new").mkdir(exist_ok=True)
        moved.append(Span(shutil.move(span.shard, tmp_path / "new"), span.start, span.stop))
    again = make(Rows(moved, FIELDS), 0)
    again.load_state_dict(state)
    assert not again.restarted
    assert drain(again) == rest
    again.close()


def test_a_rank_without_rows_is_exhausted_at_once(make: Make) -> None:
    reader = make(Rows([], FIELDS), 0)
    assert reader.num_samples == 0
    for epoch in (0, 1):
        reader.start_epoch(epoch)
        assert reader.next_batch(4) is None
    reader.load_state_dict(reader.state_dict())
    assert not reader.restarted
    reader.close()


def test_the_caller_may_change_a_batch(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    expected = drain(reader)
    reader.start_epoch(0)
    numbers = []
    while (batch := reader.next_batch(6)) is not None:
        numbers += row_numbers(batch)
        for array in batch.values():
            array[...] = 99
    assert numbers == expected
    reader.start_epoch(0)
    assert drain(reader) == expected
    reader.close()


def test_misuse_is_an_error(make: Make, spans: list[Span]) -> None:
    reader = make(Rows(spans, FIELDS), 0)
    with pytest.raises(ValueError, match="at least 1"):
        reader.next_batch(0)
    reader.next_batch(1)
    reader.close()
    reader.close()
    with pytest.raises(RuntimeError):
        reader.next_batch(1)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hvd_train-reader")]


def test_the_thread_ends_with_close_even_while_it_reads(spans: list[Span]) -> None:
    for batches in (0, 1, 3):
        reader = small_stream(Rows(spans, FIELDS), 0)
        reader.start_epoch(0)
        for _ in range(batches):
            reader.next_batch(5)
        reader.close()
        assert threads() == []


def test_the_next_window_is_read_before_it_is_asked_for(
    spans: list[Span], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[str, int, int]] = []
    second_window = threading.Event()
    read_into = Rows.read_into

    def recording(rows: Rows, batch: Mapping[str, Array], at: int, start: int, stop: int) -> None:
        read_into(rows, batch, at, start, stop)
        reads.append((threading.current_thread().name, start, stop))
        if len(reads) == 6:
            second_window.set()

    monkeypatch.setattr(Rows, "read_into", recording)
    reader = small_stream(Rows(spans, FIELDS), 0)
    reader.next_batch(1)
    assert second_window.wait(seconds(30)), "only the first window was read"
    reader.close()
    assert all(name.startswith("hvd_train-reader") for name, _, _ in reads)


def test_a_damaged_chunk_surfaces_in_next_batch_and_names_its_rows(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "one.h5", 100, chunks=(10, 3), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["inputs"].id.get_chunk_info(4)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    stream = StreamReader(
        Rows([Span(str(path), 0, 100)], FIELDS), 0, block_bytes=10 * ROW_BYTES, window_blocks=2
    )
    with pytest.raises(DataError, match=r"one\.h5: dataset `inputs`, rows 40 to 49: .*damaged"):
        drain(stream)
    stream.close()
    assert threads() == []
    with pytest.raises(DataError, match=r"one\.h5: dataset `inputs`, rows 0 to 99"):
        MemoryReader(Rows([Span(str(path), 0, 100)], FIELDS), 0).open()


def test_memory_is_bounded_by_two_windows(tmp_path: Path) -> None:
    rows, block_rows, window_blocks = 100_000, 256, 8
    path = write_foreign(tmp_path / "large.h5", rows)
    reader = StreamReader(
        Rows([Span(str(path), 0, rows)], FIELDS),
        0,
        block_bytes=block_rows * ROW_BYTES,
        window_blocks=window_blocks,
    )
    window_bytes = block_rows * window_blocks * ROW_BYTES
    tracemalloc.start()
    try:
        for epoch in (0, 1):
            reader.start_epoch(epoch)
            count = 0
            while (batch := reader.next_batch(32)) is not None:
                count += len(batch["inputs"])
            assert count == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        reader.close()
    order_bytes = block_rows * window_blocks * 8 + 8 * rows // block_rows
    bound = 2 * window_bytes + 2 * order_bytes + 128 * 1024
    assert bound < rows * ROW_BYTES / 5, "far below the part itself"
    assert peak < bound


def test_memory_holds_no_more_than_auto_counted(tmp_path: Path) -> None:
    rows = 40_000
    path = write_foreign(tmp_path / "large.h5", rows)
    budget = rows * (ROW_BYTES + ORDER_BYTES)
    tracemalloc.start()
    try:
        reader = make_reader([Span(str(path), 0, rows)], DataConfig(), 0, FIELDS, budget)
        assert reader.mode == "memory"
        for epoch in (0, 1, 2):
            reader.start_epoch(epoch)
            assert sum(len(batch["inputs"]) for batch in iter(lambda: reader.next_batch(32), None)) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    reader.close()
    assert peak < budget + 128 * 1024


def test_stream_mixes_blocks_and_reads_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_foreign(tmp_path / "chunked.h5", 95, chunks=(10, 3))
    ranges: list[tuple[int, int]] = []
    read_into = ShardFile.read_into

    def recording(shard: ShardFile, name: str, rows: Sequence[tuple[int, int]], out: Array) -> None:
        read_into(shard, name, rows, out)
        ranges.extend(rows)

    monkeypatch.setattr(ShardFile, "read_into", recording)
    reader = StreamReader(Rows([Span(str(path), 13, 95)], FIELDS), 0, block_bytes=ROW_BYTES, window_blocks=4)
    first = reader.next_batch(16)
    assert first is not None
    assert len({row // 10 for row in row_numbers(first)}) > 2
    assert len(drain(reader)) == 82 - 16
    reader.close()
    bounds = [13, *range(20, 95, 10), 95]
    assert set(ranges) >= set(pairwise(bounds))
    assert all(start in bounds and stop in bounds for start, stop in ranges)


def test_each_window_is_mixed_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "plain.h5", 96)
    rows = Rows([Span(str(path), 0, 96)], FIELDS)
    reader = StreamReader(rows, 0, block_bytes=8 * ROW_BYTES, window_blocks=1)
    numbers = drain(reader)
    reader.close()
    orders = {tuple(row % 8 for row in numbers[i : i + 8]) for i in range(0, 96, 8)}
    assert len(orders) > 8


@pytest.mark.parametrize("size", [5, 24, 53])
def test_the_first_row_that_is_not_finite_is_found_since_any_state(
    make: Make, spans: list[Span], size: int
) -> None:
    """In the order in which rows were drawn, over the ends of epochs, and by its number in the file."""
    bad = {3: ("one.h5", 3), 108: ("two.h5", 18), 204: ("three.h5", 4), 29: ("one.h5", 29)}
    for number, (name, row) in bad.items():
        with h5py.File(Path(spans[0].shard).with_name(name), "r+") as file:
            file["inputs"][row, 1] = [np.nan, np.inf, -np.inf][number % 3]
    reader = make(Rows(spans, FIELDS), 0)
    # Each state, and what was drawn since.
    taken: list[tuple[dict[str, Any], list[int]]] = [(reader.state_dict(), [])]
    for epoch in range(3):
        reader.start_epoch(epoch)
        while (batch := reader.next_batch(size)) is not None:
            for _, drawn in taken:
                drawn += batch["inputs"][:, 0].astype(int).tolist()
            for state, drawn in taken[-9::2]:
                found = reader.not_finite_since(state)
                first = next((number for number in drawn if number in bad), None)
                if first is None:
                    assert found == ""
                    continue
                (name, row), value = bad[first], ["nan", "inf", "-inf"][first % 3]
                assert found.endswith(f"{name}: `inputs` holds {value} in row {row}"), (found, drawn)
            taken.append((reader.state_dict(), []))
    reader.close()


def test_a_value_too_large_for_float32_is_not_finite_either(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"] = np.array([[1.0, 2.0], [3.0, 3.5e38], [4.0, np.nan]])
        file["targets"] = np.arange(3)
    fields = {"inputs": FieldSpec(shape=(2,), dtype="float64"), "targets": FieldSpec(shape=(), dtype="int64")}
    rows = Rows([Span(str(tmp_path / "a.h5"), 1, 3)], fields)
    drawn = np.array([1, 0])
    assert first_not_finite(rows, drawn).endswith("a.h5: `inputs` holds nan in row 2")
    assert first_not_finite(rows, drawn[1:]).endswith(
        "`inputs` holds 3.5e+38, too large for float32 in row 1"
    )
    assert first_not_finite(rows, drawn[:0]) == ""
    assert first_not_finite(Rows(rows.spans, {"targets": fields["targets"]}), drawn) == ""


@pytest.mark.parametrize(
    ("reading", "budget", "mode"),
    [
        ("auto", 53 * (ROW_BYTES + ORDER_BYTES), "memory"),
        ("auto", 53 * (ROW_BYTES + ORDER_BYTES) - 1, "mmap"),
        ("auto", 53 * ROW_BYTES * 2 // 3, "stream"),
        ("memory", 0, "memory"),
        ("mmap", 0, "mmap"),
        ("stream", 1 << 30, "stream"),
    ],
)
def test_make_reader_picks_and_says_which(spans: list[Span], reading: str, budget: int, mode: str) -> None:
    reader = make_reader(spans, DataConfig(reading=reading), 0, FIELDS, budget)  # type: ignore[arg-type]
    assert reader.mode == mode
    assert sorted(drain(reader)) == EXPECTED
    reader.close()


def test_rows_read_across_more_files_than_are_kept_open(tmp_path: Path) -> None:
    spans = [Span(str(write_foreign(tmp_path / f"{i:02d}.h5", 3, first=10 * i)), 0, 3) for i in range(40)]
    rows = Rows(spans, FIELDS)
    assert len(rows) == 120
    assert row_numbers(rows.read(0, 120)) == [10 * i + j for i in range(40) for j in range(3)]
    assert row_numbers(rows.read(4, 8)) == [11, 12, 20, 21]
    assert row_numbers(rows.read(7, 7)) == []
    with pytest.raises(IndexError):
        rows.read(100, 121)
    rows.close()
    assert row_numbers(rows.read(119, 120)) == [392]
    rows.close()


def test_rows_of_a_shard_that_became_shorter_are_an_error(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 10)
    rows = Rows([Span(str(path), 0, 20)], FIELDS)
    with pytest.raises(DataError, match=r"a\.h5: rows 0 to 20 requested, but the file has 10"):
        rows.read(0, 20)
    rows.close()


def test_values_arrive_in_the_dtype_of_the_fields(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file["inputs"] = np.arange(6, dtype=">f8").reshape(3, 2)
        file["targets"] = np.array([1, 2, 3], ">i2")
    with ShardFile(tmp_path / "big.h5", plain(("inputs", "targets"))) as shard:
        info = shard.info
    assert info.fields["inputs"] == FieldSpec(shape=(2,), dtype="float64")
    batch = Rows([Span(info.path, 0, 3)], info.fields).read(0, 3)
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (np.dtype("=f8"), np.dtype("=i2"))
    np.testing.assert_array_equal(batch["inputs"], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(batch["targets"], [1, 2, 3])
