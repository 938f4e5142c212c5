"""The deal: every row to exactly one rank, balanced as far as it says, for many shards and world sizes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_train.data.deal import Span, deal, rows_of, split_validation
from hvd_train.errors import DataError


def spans_of(sizes: list[int]) -> list[Span]:
    return [Span(f"s{i:03d}.h5", 0, size) for i, size in enumerate(sizes)]


def num_rows(part: tuple[Span, ...]) -> int:
    return sum(span.num_rows for span in part)


def rows(spans: tuple[Span, ...] | list[Span]) -> list[tuple[str, int]]:
    return [(span.shard, row) for span in spans for row in range(span.start, span.stop)]


def many_cases() -> list[tuple[list[int], int]]:
    generator = random.Random(7)
    cases = [
        ([generator.choice([0, 1, 2, 3, 17, 40, 97]) for _ in range(num_shards)], world_size)
        for num_shards in (0, 1, 2, 3, 5, 8, 13)
        for world_size in (1, 2, 3, 4, 5, 7, 8, 16)
        for _ in range(4)
    ]
    return [*cases, ([1000], 7), ([1], 5), ([10**6 + 3, 1], 4), ([5, 5, 5, 5], 3)]


@pytest.mark.parametrize(("sizes", "world_size"), many_cases())
def test_every_row_goes_to_exactly_one_rank(sizes: list[int], world_size: int) -> None:
    spans = spans_of(sizes)
    parts = deal(spans, world_size)
    assert len(parts) == world_size
    if sum(sizes) < 10_000:
        assert sorted(rows([span for part in parts for span in part])) == sorted(rows(spans))
    assert sum(map(num_rows, parts)) == sum(sizes)
    assert all(span.num_rows > 0 for part in parts for span in part)
    assert deal(spans, world_size) == parts


@pytest.mark.parametrize(("sizes", "world_size"), many_cases())
def test_balance_is_within_the_stated_bound(sizes: list[int], world_size: int) -> None:
    loads = [num_rows(part) for part in deal(spans_of(sizes), world_size)]
    present = [size for size in sizes if size]
    if len(present) > world_size:
        assert max(loads) - min(loads) <= max(present)
    elif present:
        assert max(loads) <= math.ceil(sum(present) / (world_size - len(present) + 1))


@pytest.mark.parametrize("sizes", [[4], [9, 3], [30, 10, 1], [7, 7, 7], [100, 1, 1], [12, 30, 5]])
@pytest.mark.parametrize("world_size", [3, 4, 5, 6, 7])
def test_no_assignment_of_ranks_to_fewer_shards_is_better(sizes: list[int], world_size: int) -> None:
    loads = [num_rows(part) for part in deal(spans_of(sizes), world_size)]
    allotments = itertools.product(range(1, world_size + 1), repeat=len(sizes))
    best = min(
        max(math.ceil(size / ranks) for size, ranks in zip(sizes, allotment, strict=True))
        for allotment in allotments
        if sum(allotment) == world_size
    )
    assert max(loads) == best


def test_with_as_many_shards_as_ranks_rank_i_gets_shard_i() -> None:
    spans = spans_of([5, 500, 1])
    assert deal(spans, 3) == [(span,) for span in spans]


def test_fewer_shards_are_cut_so_that_parts_of_one_differ_by_one_row() -> None:
    parts = deal(spans_of([100, 10]), 4)
    assert parts == [
        (Span("s000.h5", 0, 33),),
        (Span("s000.h5", 33, 66),),
        (Span("s000.h5", 66, 100),),
        (Span("s001.h5", 0, 10),),
    ]


def test_more_ranks_than_rows_leaves_ranks_with_nothing() -> None:
    loads = [num_rows(part) for part in deal(spans_of([2, 1]), 5)]
    assert sorted(loads) == [0, 0, 1, 1, 1]
    assert deal([], 2) == [(), ()]


def test_larger_shards_are_dealt_first_and_ties_go_to_the_lower_rank() -> None:
    parts = deal(spans_of([1, 5, 4, 3, 3]), 2)
    assert [num_rows(part) for part in parts] == [8, 8]
    names = [[span.shard for span in part] for part in parts]
    assert names == [["s001.h5", "s004.h5"], ["s000.h5", "s002.h5", "s003.h5"]]


def test_spans_of_one_shard_count_as_one_shard() -> None:
    spans = [Span("a", 0, 10), Span("a", 20, 30), Span("b", 0, 5)]
    assert deal(spans, 2) == [(Span("a", 0, 10), Span("a", 20, 30)), (Span("b", 0, 5),)]
    assert deal(spans, 3)[:2] == [(Span("a", 0, 10),), (Span("a", 20, 30),)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    world_size=st.integers(1, 12),
    within=st.integers(1, 100),
    unit=st.sampled_from([1, 7, 32]),
)
def test_ranks_differ_by_a_batch_at_most(sizes: list[int], world_size: int, within: int, unit: int) -> None:
    spans = spans_of(sizes)
    parts = deal(spans, world_size, within, {span.shard: unit for span in spans})
    loads = list(map(num_rows, parts))
    assert len(parts) == world_size
    assert max(loads) - min(loads) <= within
    assert sorted(rows([span for part in parts for span in part])) == sorted(rows(spans))
    for part in parts:
        assert list(part) == sorted(part), "in the order of the shards"
    before = deal(spans, world_size)
    if max(map(num_rows, before)) - min(map(num_rows, before)) <= within:
        assert parts == before
    assert sum(map(len, parts)) <= sum(map(len, before)) + 2 * world_size, "few cuts"


def test_rows_move_from_the_fullest_rank_to_the_emptiest() -> None:
    spans = spans_of([100, 10, 10, 10])
    assert deal(spans, 4, 90) == [(span,) for span in spans]
    first, *others = spans
    assert deal(spans, 4, 1) == [
        (Span(first.shard, 0, 32),),
        (Span(first.shard, 77, 100), others[0]),
        (Span(first.shard, 54, 77), others[1]),
        (Span(first.shard, 32, 54), others[2]),
    ]


def test_cuts_are_at_chunks_where_that_is_close() -> None:
    spans = spans_of([1000, 400])
    assert deal(spans, 2, 64) == [
        (Span("s000.h5", 0, 700),),
        (Span("s000.h5", 700, 1000), Span("s001.h5", 0, 400)),
    ]
    assert deal(spans, 2, 64, {"s000.h5": 128, "s001.h5": 128})[0] == (Span("s000.h5", 0, 700),), (
        "68 rows off"
    )
    assert deal(spans, 2, 64, {"s000.h5": 100})[0] == (Span("s000.h5", 0, 700),)
    assert deal(spans, 2, 64, {"s000.h5": 32})[0] == (Span("s000.h5", 0, 704),)


def test_rows_of_crosses_spans() -> None:
    spans = [Span("a", 10, 20), Span("b", 0, 3), Span("c", 5, 9)]
    assert rows_of(spans, 8, 15) == (Span("a", 18, 20), Span("b", 0, 3), Span("c", 5, 7))
    assert rows_of(spans, 4, 4) == ()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [[1000], [997, 3, 64], [100] * 7, [1, 1, 200]])
def test_validation_takes_its_share_and_leaves_the_rest(sizes: list[int], fraction: float) -> None:
    spans = spans_of(sizes)
    train, validation = split_validation(spans, fraction)
    assert num_rows(validation) == math.floor(fraction * sum(sizes))
    assert sorted(rows(train) + rows(validation)) == sorted(rows(spans))
    assert split_validation(spans, fraction) == (train, validation)


def test_validation_sees_every_class_of_sorted_data() -> None:
    _, validation = split_validation(spans_of([1000, 1000]), 0.1)
    classes = [(shard, row // 100) for shard, row in rows(validation)]
    counts = {key: classes.count(key) for key in classes}
    assert len(counts) == 20, "20 stretches of 100 rows, one class each"
    assert max(counts.values()) - min(counts.values()) <= 3


def test_a_fraction_that_leaves_a_part_empty_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data.validation = 0.01: of 50 .*leaves 0 .*Expected at least 1 row"
    ):
        split_validation(spans_of([50]), 0.01)
