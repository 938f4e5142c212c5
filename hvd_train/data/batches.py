"""How rows are cut into batches: so many at a time, and no batch of a single row where there are more.

A single row that would be left over joins the batch before it: batch norm cannot train on one, and a standard
deviation over one is not a number.
"""

from __future__ import annotations

from itertools import pairwise


def next_batch(left: int, batch_size: int) -> int:
    """Rows of the next batch of the `left` that are left."""
    return left if left == batch_size + 1 > 2 else min(left, batch_size)


def num_batches(rows: int, batch_size: int) -> int:
    """Batches that so many rows are."""
    full, rest = divmod(rows, batch_size)
    return full + (rest > 0) - (rest == 1 and full > 0)


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """The first row of each batch and the one after its last."""
    starts = [b * batch_size for b in range(num_batches(rows, batch_size))]
    return list(pairwise([*starts, rows]))
