"""How rows are cut into batches: so many at a time, and no batch of a single row where there are more.

A single row that would be left over joins the batch before it: batch norm cannot train on one, and a standard
deviation over one is not a number. What becomes of several rows that are left over at the end of an epoch of
training, but are no full batch, is `data.last_batch`; every other use keeps them.
"""

from __future__ import annotations

from itertools import pairwise

from hvd_train.config.data import LastBatch


def next_batch(left: int, batch_size: int, last: LastBatch = "keep", *, taken: int = 0) -> int:
    """Rows of the next batch of the `left` that are left after `taken` of an epoch; 0 if there is none.

    The first batch of an epoch is never empty: `drop` leaves out no rank's only rows. A resumed run whose
    batches have another size may have a single row left that no batch can take: it is left out.
    """
    if taken and left < batch_size and (last == "drop" or left == 1):
        return 0
    if last == "merge" and left < 2 * batch_size:
        return left
    return left if last == "keep" and left == batch_size + 1 > 2 else min(left, batch_size)


def num_batches(left: int, batch_size: int, last: LastBatch = "keep", *, taken: int = 0) -> int:
    """Batches that so many rows are, as `next_batch` cuts them."""
    full, rest = divmod(left, batch_size)
    if not full:
        return int(next_batch(left, batch_size, last, taken=taken) > 0)
    return full + (last == "keep" and rest > 1)


def largest_batch(batch_size: int, last: LastBatch) -> int:
    """Rows of the largest batch that `next_batch` gives, up to a single row that joins one."""
    return 2 * batch_size - 1 if last == "merge" else batch_size


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """The first row of each batch and the one after its last; all rows are in a batch."""
    starts = [b * batch_size for b in range(num_batches(rows, batch_size))]
    return list(pairwise([*starts, rows]))
