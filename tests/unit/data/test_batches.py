"""Every row is in one batch, and no batch has a single row unless there is no other way."""

from __future__ import annotations

import pytest

from hvd_train.data.batches import batch_bounds, next_batch, num_batches


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
