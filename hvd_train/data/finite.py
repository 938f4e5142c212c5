"""Finds the first value that is not finite, for a loss or a parameter that is not."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from hvd_train.data.format import Array
from hvd_train.data.picked import AnyRows, Picked
from hvd_train.data.rows import Rows
from hvd_train.data.screen import MARK, USABLE

_READ_BYTES = 1 << 20
_LARGEST = np.finfo(np.float32).max


def first_not_finite(rows: AnyRows, drawn: npt.NDArray[np.int64]) -> str:
    """The first of the rows numbered `drawn` that holds a value that is not finite in float32, as file,
    dataset, value and row of the file; empty if there is none. Rows that are left out do not count.

    Reads the rows again, from files of its own. Raises `DataError`.
    """
    if isinstance(rows, Picked):
        return first_not_finite(rows.rows, rows.numbers(drawn))
    fields = {name: field for name, field in rows.fields.items() if np.dtype(field.dtype).kind == "f"}
    if not fields:
        return ""
    own = Rows(rows.spans, fields, screen=rows.screen)
    numbers = np.unique(drawn)
    # Blocks of the files, each read once from the first to the last of its rows that were drawn.
    cuts = np.flatnonzero(np.diff(numbers // max(1, _READ_BYTES // max(1, own.row_bytes)))) + 1
    found: dict[int, str] = {}
    try:
        for block in np.split(numbers, cuts) if len(numbers) else ():
            first = int(block[0])
            batch = own.read(first, int(block[-1]) + 1)
            if (marks := batch.pop(MARK, None)) is not None:
                block = block[marks[block - first] == USABLE]
            for name, values in batch.items():
                for index, value in _not_finite(values[block - first]):
                    found.setdefault(int(block[index]), _describe(own, int(block[index]), name, value))
    finally:
        own.close()
    if not found:
        return ""
    return found[next(row for row in drawn.tolist() if row in found)]


def _not_finite(values: Array) -> list[tuple[int, float]]:
    """The rows of `values` [rows, ...] with such a value, and the first such value of each."""
    flat = values.reshape(len(values), -1)
    bad = ~(np.abs(flat) <= _LARGEST)
    rows = np.flatnonzero(bad.any(axis=1))
    return [(int(row), float(flat[row, bad[row].argmax()])) for row in rows]


def _describe(rows: Rows, row: int, name: str, value: float) -> str:
    stops = list(accumulate(span.num_rows for span in rows.spans))
    index = bisect_right(stops, row)
    span = rows.spans[index]
    beyond = ", too large for float32" if np.isfinite(value) else ""
    return f"{span.shard}: `{name}` holds {value:g}{beyond} in row {span.stop - (stops[index] - row)}"
