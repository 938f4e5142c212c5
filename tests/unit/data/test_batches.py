"""Every row is in one batch, unless it is dropped; a batch has a single row only if there is no other way."""

from __future__ import annotations

import pytest

from hvd_train.config.data import LastBatch
from hvd_train.data.batches import batch_bounds, largest_batch, next_batch, num_batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 64])
def test_rows_are_cut_into_batches(batch_size: int) -> None:
    for rows in range(3 * batch_size + 3):
        sizes, left = [], rows
        while left:
            sizes.append(next_batch(left, batch_size))
            left -= sizes[-1]
        assert sum(sizes) == rows
        assert len(sizes) == num_batches(rows, batch_size)
        assert all(size == batch_size for size in sizes[:-1])
        assert not sizes or 1 <= sizes[-1] <= batch_size + 1
        assert 1 not in sizes or batch_size == 1 or rows == 1
        assert [stop - start for start, stop in batch_bounds(rows, batch_size)] == sizes
        assert [start for start, _ in batch_bounds(rows, batch_size)] == [
            i * batch_size for i in range(len(sizes))
        ]


def cut(rows: int, batch_size: int, last: LastBatch, taken: int = 0) -> list[int]:
    sizes: list[int] = []
    while size := next_batch(rows - taken, batch_size, last, taken=taken):
        assert num_batches(rows - taken, batch_size, last, taken=taken) > 0
        sizes.append(size)
        taken += size
    assert num_batches(rows - taken, batch_size, last, taken=taken) == 0
    return sizes


@pytest.mark.parametrize(
    ("rows", "keep", "drop", "merge"),
    [
        (0, [], [], []),
        (1, [1], [1], [1]),  # all that the rank has
        (3, [3], [3], [3]),
        (4, [4], [4], [4]),
        (5, [5], [4], [5]),
        (7, [4, 3], [4], [7]),
        (8, [4, 4], [4, 4], [4, 4]),
        (9, [4, 5], [4, 4], [4, 5]),
        (11, [4, 4, 3], [4, 4], [4, 7]),
    ],
)
def test_the_last_batch_is_kept_dropped_or_merged(
    rows: int, keep: list[int], drop: list[int], merge: list[int]
) -> None:
    assert [cut(rows, 4, last) for last in ("keep", "drop", "merge")] == [keep, drop, merge]
    assert [num_batches(rows, 4, last) for last in ("keep", "drop", "merge")] == list(
        map(len, (keep, drop, merge))
    )
    assert max([0, *merge]) <= largest_batch(4, "merge") == 7


def test_batches_of_one_row_are_as_many_as_rows_whatever_is_chosen() -> None:
    assert [cut(3, 1, last) for last in ("keep", "drop", "merge")] == [[1, 1, 1]] * 3


def test_a_single_row_that_a_resumed_run_has_left_is_in_no_batch() -> None:
    assert [cut(25, 8, last, taken=24) for last in ("keep", "drop", "merge")] == [[]] * 3
    assert [cut(25, 8, last, taken=22) for last in ("keep", "drop", "merge")] == [[3], [], [3]]
