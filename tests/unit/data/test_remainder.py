"""What is left of an interrupted epoch: every row exactly once, however often it is dealt anew."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_train.config import DataConfig
from hvd_train.data.bits import Bits
from hvd_train.data.deal import Span, deal
from hvd_train.data.format import FieldSpec
from hvd_train.data.picked import Picked
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.readers.make import make_reader, reader_of
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.permutation import cursor_of, order_of
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.remainder import Leg, Part, Remainder, first_parts, join, undone
from hvd_train.data.rows import Rows
from tests.unit.data.shards import row_numbers, write_foreign

FIELDS = {"inputs": FieldSpec(shape=(3,), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}

Row = tuple[str, int]


def rows_in(part: Part) -> list[Row]:
    """The rows of a part, one by one."""
    rows = [(span.shard, row) for span in part.spans for row in range(span.start, span.stop)]
    return rows if part.bits is None else [row for i, row in enumerate(rows) if part.bits.read(i, i + 1)[0]]


def some_spans(sizes: list[int], holes: bool) -> list[Span]:
    """One span a shard, or two with rows between them, as a split for validation leaves them."""
    spans = []
    for number, size in enumerate(sizes):
        cut = size // 2 if holes else size
        spans += [Span(f"s{number}.h5", 3, 3 + cut), Span(f"s{number}.h5", 5 + cut, 5 + size)]
    return [span for span in spans if span.num_rows]


def legs(ranks: int, seed: int, batch_size: int, steps: int, parts: list[Part]) -> tuple[Leg, list[Row]]:
    """So many steps of every rank on its part, and the rows that they take."""
    positions, drawn = {}, list[Row]()
    for part in parts:
        rows, mine = part.rows(FIELDS), rows_in(part)
        if not mine:
            continue
        cursor = cursor_of(rows, seed)
        position = min(steps * batch_size, len(mine))
        positions[cursor.fingerprint] = position
        drawn += [mine[i] for i in order_of(rows, cursor, 3)[:position]]
    return Leg(parts=ranks, seed=seed, batch_size=batch_size, positions=positions), drawn


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=9).filter(any),
    holes=st.booleans(),
    starts=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(1, 7), st.integers(0, 9)), max_size=5
    ),
)
def test_every_row_once_whatever_the_shards_the_ranks_and_the_cuts(
    sizes: list[int], holes: bool, starts: list[tuple[int, int, int, int]]
) -> None:
    spans = some_spans(sizes, holes)
    whole = [(span.shard, row) for span in spans for row in range(span.start, span.stop)]
    left, used = None, list[Row]()
    for ranks, seed, batch_size, steps in starts:
        if left is None:
            parts = first_parts(spans, deal(spans, ranks, batch_size))
        else:
            parts = [left.part(i, ranks) for i in range(ranks)]
        counts = [len(rows_in(part)) for part in parts]
        if left is None:
            assert max(counts) - min(counts) <= batch_size
        else:
            assert max(counts) == left.most_rows(ranks)
            assert max(counts) - min(filter(None, counts), default=0) <= 1
            assert left.num_rows < 2 or 1 not in counts
        leg, drawn = legs(ranks, seed, batch_size, steps, parts)
        used += drawn
        found = {index: undone(part, leg, 3, FIELDS) for index, part in enumerate(parts)}
        left = join(spans, parts, {i: bits for i, bits in found.items() if bits is not None})
        assert left.num_rows == len(whole) - len(used)
    rest = whole if left is None else [row for i in range(4) for row in rows_in(left.part(i, 4))]
    assert sorted(used + rest) == sorted(whole)


def test_other_data_are_not_taken_for_those_of_the_leg() -> None:
    spans = some_spans([30, 20], holes=False)
    parts = first_parts(spans, deal(spans, 2))
    leg, _ = legs(2, 0, 4, 2, parts)
    for part in parts:
        assert undone(part, leg, 3, FIELDS) is not None
    other = msgspec.structs.replace(leg, seed=1)
    shorter = some_spans([29, 20], holes=False)
    for part in first_parts(shorter, deal(shorter, 2))[:1] + parts:
        assert undone(part, other, 3, FIELDS) is None


def test_bits() -> None:
    generator = np.random.default_rng(0)
    for size in (0, 1, 7, 8, 9, 5003, (1 << 20) + 5):
        flags = generator.random(size) < 0.3
        numbers = generator.permutation(np.flatnonzero(flags))
        bits = Bits(size)
        bits.set(numbers[::2])
        bits.set(numbers[1::2])
        assert bits.count() == len(numbers)
        bounds = np.unique(generator.integers(0, size + 1, 50))
        before = np.concatenate([[0], np.cumsum(flags)])
        np.testing.assert_array_equal(bits.counts(bounds), before[bounds])
        for count in {0, min(1, len(numbers)), len(numbers) // 2, len(numbers)}:
            place = bits.after(count)
            assert before[place] == count
            assert place == 0 or flags[place - 1]
        other = Bits(size)
        for start, stop in bits.pieces(0, size):
            other.write(start, bits.read(start, stop))
        np.testing.assert_array_equal(other.packed, bits.packed)


@pytest.fixture
def picked(tmp_path: Path) -> Picked:
    """Every third row of one shard, and no row but the last of another."""
    spans = [Span(str(write_foreign(tmp_path / "a.h5", 50, chunks=(7, 3))), 10, 50)]
    spans.append(Span(str(write_foreign(tmp_path / "b.h5", 9000, 50)), 0, 9000))
    bits = Bits(9040)
    bits.set(np.array([*range(0, 40, 3), 9039]))
    return Picked(Rows(spans, FIELDS), bits)


EXPECTED = [*range(10, 50, 3), 9049]


def test_picked_rows_are_read_in_order(picked: Picked) -> None:
    assert len(picked) == len(EXPECTED) == 15
    for start in range(16):
        for stop in range(start, 16):
            assert row_numbers(picked.read(start, stop)) == EXPECTED[start:stop]
    numbers = picked.numbers(np.array([14, 0, 3, 3]))
    assert numbers.tolist() == [9039, 0, 9, 9]
    assert picked.blocks(np.array([[0, 1], [1, 3], [3, 40], [40, 9040]])).tolist() == [
        [0, 1],
        [1, 14],
        [14, 15],
    ]
    picked.close()


@pytest.mark.parametrize("window_blocks", [0, 2, 128])
def test_readers_take_picked_rows(picked: Picked, window_blocks: int) -> None:
    """In another order every epoch, and again from every position; 0: in memory."""

    def make() -> MemoryReader | StreamReader:
        if not window_blocks:
            return MemoryReader(picked, 5)
        return StreamReader(picked, 5, block_bytes=60, window_blocks=window_blocks, repeats=False)

    reader = make()
    orders = []
    for epoch in (0, 1):
        reader.start_epoch(epoch)
        orders.append([])
        while (batch := reader.next_batch(4)) is not None:
            orders[-1] += row_numbers(batch)
        assert sorted(orders[-1]) == EXPECTED
    assert orders[0] != orders[1]
    for position in range(1, 15):
        reader.start_epoch(1)
        reader.next_batch(position)
        again = make()
        again.load_state_dict(json.loads(json.dumps(reader.state_dict())))
        assert not again.restarted
        batch = again.next_batch(20)
        assert batch is not None
        assert row_numbers(batch) == orders[1][position:]
        again.close()
    reader.close()


def test_other_picked_rows_are_another_part(picked: Picked) -> None:
    reader = MemoryReader(picked, 0)
    bits = Bits(9040)
    bits.set(np.arange(15))
    for rows in (Picked(picked.rows, bits), picked.rows):
        other = MemoryReader(rows, 0)
        other.load_state_dict(reader.state_dict())
        assert other.restarted


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_the_regular_reader_takes_over_in_the_next_epoch(reading: str, tmp_path: Path) -> None:
    """And a value that is not finite is found on both sides of the change."""
    spans = [Span(str(write_foreign(tmp_path / "a.h5", 40)), 0, 40)]
    data = DataConfig(reading=reading)  # type: ignore[arg-type]
    bits = Bits(40)
    bits.set(np.arange(0, 40, 2))
    left = Remainder(spans, bits)
    parts = [(Span(spans[0].shard, 0, 20),), (Span(spans[0].shard, 20, 40),)]
    reader = EpochReader(partial(reader_of, data=data, seed=0, memory_budget_bytes=0), parts, FIELDS, rank=1)
    reader.take_up(4, left.part(1, 2).rows(FIELDS))
    reader.open()
    assert (reader.num_samples, reader.left) == (10, 10)
    assert sorted(row_numbers(reader.next_batch(20) or {})) == [*range(20, 40, 2)]
    assert reader.next_batch(20) is None
    state = reader.state_dict()
    reader.start_epoch(5)
    assert (reader.num_samples, reader.left) == (20, 20)
    regular = make_reader(parts[1], data, 0, FIELDS, 0)
    regular.start_epoch(5)
    for _ in range(3):
        ours, theirs = reader.next_batch(7), regular.next_batch(7)
        assert ours is not None
        assert theirs is not None
        assert row_numbers(ours) == row_numbers(theirs)
    assert reader.not_finite_since(state) == ""
    reader.start_epoch(4)
    assert reader.left == 10
    reader.drop()
    reader.start_epoch(4)
    assert reader.left == 20
    reader.close()
    regular.close()
