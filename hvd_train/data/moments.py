"""Mean and deviation of groups of values: of each component or channel of a sample, or of all its values.

Rows are taken in blocks that are cut at fixed row numbers of the whole data set. Within a block sums are
rounded as sums of float64 are, always alike; blocks are added without rounding. So the figures have the same
bits however the blocks are dealt to ranks, on machines that add float64 alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np

from hvd_train.data.deal import Span, rows_of
from hvd_train.data.exact_sums import ExactSums, Floats
from hvd_train.data.format import Array, FieldSpec, mask_name
from hvd_train.data.grouping import Grouping, shape_of_moments
from hvd_train.data.lengths import with_mask
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen, usable
from hvd_train.data.values import root

_BLOCK_VALUES = 1 << 20
"""Of a block; one row at least."""

_FAR = 400
"""Up to this power of two, and down to its inverse, squares and their sums are ordinary numbers."""


class Moments:
    """What is known of the values of each of some groups: the arrays are [groups].

    Args:
        groups: how many.
    """

    def __init__(self, groups: int) -> None:
        self.counts = np.zeros(groups)
        """Finite values; whole numbers."""
        self.lowest = np.full(groups, np.inf)
        self.highest = np.full(groups, -np.inf)
        """Of the finite ones; inf and -inf if there are none."""
        self.total = ExactSums(groups)
        """Their sums."""
        self.squares = ExactSums(groups)
        """The sums of their squares."""

    def add(self, block: Array, marks: Array | None = None) -> None:
        """Adds a block of integers, booleans or floating-point numbers of up to 64 bits, [rows, groups,
        values]. NaN and infinite values are left out, and those that `marks`, of the same shape, does not
        mark. Integers of 64 bits are taken as float64."""
        values = block.astype(np.float64)
        finite = np.isfinite(values) if marks is None else np.isfinite(values) & marks
        if not finite.any():
            return
        kept: dict[str, Any] = {"axis": (0, 2)} if finite.all() else {"axis": (0, 2), "where": finite}
        counts = finite.sum(axis=(0, 2)).astype(np.float64)
        low, high = values.min(**kept, initial=np.inf), values.max(**kept, initial=-np.inf)
        self.counts += counts
        np.minimum(self.lowest, low, out=self.lowest)
        np.maximum(self.highest, high, out=self.highest)
        exponents = _exponents(np.where(counts > 0, np.maximum(-low, high), 0))
        if exponents.any():
            values = np.ldexp(values, -exponents[:, None])
        center = np.zeros_like(counts)
        if block.dtype.kind == "f" or block.dtype.itemsize > 2:  # sums of narrower integers are exact
            center = values.sum(**kept) / np.maximum(counts, 1)
            values -= center[:, None]
        rest = values.sum(**kept)
        np.square(values, out=values)
        about = values.sum(**kept)
        for number in (*_product(counts, center), rest):
            self.total.add(number, exponents)
        # The squares about 0, by those about the center. What is lost in `rest` by rounding is in both sums
        # alike, and cancels in the deviation.
        square, error = _product(center, center)
        products = ((2 * center, rest), (counts, square), (counts, error))
        for number in (about, *(part for a, b in products for part in _product(a, b))):
            self.squares.add(number, 2 * exponents)


def _exponents(magnitudes: Floats) -> Array:
    """Powers of two by which numbers of these largest magnitudes are divided, since the square of a finite
    number may be infinite, or 0; 0 for ordinary ones."""
    exponents = np.frexp(magnitudes)[1]
    return np.where(np.abs(exponents) > _FAR, exponents, 0)


def _product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Two numbers whose sum is a * b without rounding (T. J. Dekker, "A Floating-Point Technique for
    Extending the Available Precision", Numerische Mathematik 18, 1971)."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    product = a * b
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _halves(a: Floats) -> tuple[Floats, Floats]:
    """Two numbers of half as many digits whose sum is `a`."""
    large = a * float((1 << 27) + 1)
    high = large - (large - a)
    return high, a - high


def moments_of(
    spans: Sequence[Span],
    name: str,
    field: FieldSpec,
    grouping: Grouping,
    rank: int = 0,
    world_size: int = 1,
    screen: Screen | None = None,
) -> Moments:
    """Those of this rank's part of the rows of `spans`; together the parts are all rows, each once, but for
    those that `screen` marks.

    Checksums are not compared without a screen: that is done when the rows are used. Not collective. Raises
    `DataError`.
    """
    num_rows, step = sum(span.num_rows for span in spans), max(1, _BLOCK_VALUES // max(1, prod(field.shape)))
    blocks = -(-num_rows // step)
    first, stop = (min(blocks * i // world_size * step, num_rows) for i in (rank, rank + 1))
    groups = prod(shape_of_moments(field.shape, grouping))
    found = Moments(groups)
    width = prod(field.shape) // max(1, groups)
    fields = with_mask(name, field)
    rows = Rows(rows_of(spans, first, stop), fields, verify=screen is not None, screen=screen)
    try:
        rows.require_in_order()
        for start in range(0, len(rows), step):
            read = usable(rows.read(start, min(start + step, len(rows))))[0]
            block, marks = read[name], read.get(mask_name(name))
            if marks is not None:
                marks = np.broadcast_to(marks.reshape(*marks.shape, *[1] * (block.ndim - 2)), block.shape)
                marks = marks.reshape(len(block), groups, width)
            found.add(block.reshape(len(block), groups, width), marks)
    finally:
        rows.close()
    return found


def mean_and_deviation(
    counts: Floats, lowest: Floats, highest: Floats, totals: list[Fraction], squares: list[Fraction]
) -> tuple[Floats, Floats]:
    """The mean of each group, and the standard deviation from it, divided by the number n of values, not n -
    1. A group of one value alone has the deviation 1, and so has one without a finite value, whose mean is
    0."""
    means, deviations = np.zeros_like(counts), np.ones_like(counts)
    for i, (count, total, square) in enumerate(zip(counts.tolist(), totals, squares, strict=True)):
        if lowest[i] < highest[i]:
            mean = total / int(count)
            means[i], deviations[i] = mean, root(max(Fraction(0), square / int(count) - mean**2)) or 1
        elif count:
            means[i] = lowest[i]
    return means, deviations
