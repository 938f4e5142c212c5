"""A summary of the values of a dataset: of blocks of rows, to be joined in any order.

Plain values and pure functions of arrays; nothing is read or printed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_train.data.format import Array

Number = int | float

MOST_COMPONENTS = 4096
"""Up to here, each component of a sample is followed by itself."""

MOST_DISTINCT = 1000
"""Up to here, different integers are counted one by one."""

_NARROW = 1 << 16
"""Integers within a range of this many values are counted in an array."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """What the values of some rows are. The sums are rational numbers: what is joined is exact, whatever the
    order of the blocks, and only the sums within a block of floating-point numbers are rounded."""

    rows: int = 0

    count: int = 0
    """Values; each of the next four counts a part of them, and the finite ones are the rest."""

    nan: int = 0
    plus_inf: int = 0
    minus_inf: int = 0
    filled: int = 0
    """Those that equal the fill value, if one was given."""

    lowest: Number | None = None
    highest: Number | None = None
    """Of the finite ones; None if there are none."""

    total: Fraction = Fraction(0)
    """Their sum."""

    squares: Fraction = Fraction(0)
    """The sum of their squares."""

    whole: bool = True
    """Whether all of them are whole numbers."""

    counts: Mapping[int, int] | None = field(default_factory=dict)
    """How often each occurs, of integers and booleans; None if more than `MOST_DISTINCT` differ, and of
    floating-point numbers."""

    components: int | None = None
    """Values of a sample; None without rows, or if the blocks differ in it."""

    constant: Mapping[int, Number] | None = None
    """The components that have one value in all rows, by their positions in a flattened sample, and this
    value; None where they are not followed: without rows, or more than `MOST_COMPONENTS`."""

    one_hot: bool = True
    """Whether every sample is a vector of one 1 and zeros, of at least two components."""

    @property
    def finite(self) -> int:
        """Values that are neither infinite, NaN nor the fill value."""
        return self.count - self.nan - self.plus_inf - self.minus_inf - self.filled

    @property
    def mean(self) -> float | None:
        """Of the finite values; None if there are none."""
        return float(self.total / self.finite) if self.finite else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the finite values from their mean, divided by their number n, not n - 1;
        None if there are none."""
        if not self.finite:
            return None
        return root(max(Fraction(0), self.squares - self.total**2 / self.finite) / self.finite)

    @property
    def magnitude(self) -> Number:
        """The largest absolute value of the finite ones; 0 if there are none."""
        return 0 if self.lowest is None or self.highest is None else max(-self.lowest, self.highest)

    def figures(self) -> dict[str, float | None]:
        """Plain numbers by name, without `counts`; `constant` is the number of such components."""
        return {
            "rows": self.rows,
            "count": self.count,
            "nan": self.nan,
            "plus_inf": self.plus_inf,
            "minus_inf": self.minus_inf,
            "filled": self.filled,
            "lowest": self.lowest,
            "highest": self.highest,
            "mean": self.mean,
            "deviation": self.deviation,
            "components": self.components,
            "constant": None if self.constant is None else len(self.constant),
        }


def values_of(block: Array, fill: Number | None = None, marks: Array | None = None) -> Values:
    """Of a block of integers, booleans or floating-point numbers of up to 64 bits, [rows, ...].

    Args:
        fill: a value that marks missing ones. Those that equal it are counted, and are part of nothing else
            but `constant` and `one_hot`.
        marks: of rows that are padded, where they have values: [rows, length] booleans. No component of a
            sample is then followed by itself.
    """
    rows = len(block)
    if not rows:
        return Values()
    padded = marks is not None
    samples = block[marks].reshape(1, -1) if padded else block.reshape(rows, -1)
    samples = samples.view(np.uint8) if samples.dtype == bool else samples
    values = samples.reshape(-1)
    filled = 0
    if fill is not None:
        kept = values != fill
        filled = values.size - int(np.count_nonzero(kept))
        values = values[kept] if filled else values
    return Values(
        rows=rows,
        count=samples.size,
        filled=filled,
        components=None if padded else samples.shape[1],
        constant=None if padded else _constant(samples),
        one_hot=not padded and _one_hot(block),
        **(_of_floats(values) if values.dtype.kind == "f" else _of_integers(values)),
    )


def join(summaries: Iterable[Values]) -> Values:
    """The summary of all of them together."""
    return reduce(_join_two, summaries, Values())


def _join_two(a: Values, b: Values) -> Values:
    if not a.rows or not b.rows:
        return a if a.rows else b
    alike = a.components == b.components
    sums = ("rows", "count", "nan", "plus_inf", "minus_inf", "filled", "total", "squares")
    return Values(
        **{name: getattr(a, name) + getattr(b, name) for name in sums},
        lowest=min((x.lowest for x in (a, b) if x.lowest is not None), default=None),
        highest=max((x.highest for x in (a, b) if x.highest is not None), default=None),
        whole=a.whole and b.whole,
        counts=_join_counts(a.counts, b.counts),
        components=a.components if alike else None,
        constant=_join_constant(a.constant, b.constant) if alike else None,
        one_hot=a.one_hot and b.one_hot,
    )


def _join_counts(a: Mapping[int, int] | None, b: Mapping[int, int] | None) -> Mapping[int, int] | None:
    if a is None or b is None:
        return None
    joined = {value: a.get(value, 0) + b.get(value, 0) for value in (*a, *b)}
    return joined if len(joined) <= MOST_DISTINCT else None


def _join_constant(
    a: Mapping[int, Number] | None, b: Mapping[int, Number] | None
) -> Mapping[int, Number] | None:
    if a is None or b is None:
        return None
    return {at: value for at, value in a.items() if at in b and _same(value, b[at])}


def _same(a: Number, b: Number) -> bool:
    return a == b or (a != a and b != b)  # two NaN


def _constant(samples: Array) -> dict[int, Number] | None:
    """Of [rows, components]."""
    if samples.shape[1] > MOST_COMPONENTS:
        return None
    same = samples == samples[0]
    if samples.dtype.kind == "f":
        same |= np.isnan(samples) & np.isnan(samples[0])
    positions = np.flatnonzero(same.all(axis=0))
    return dict(zip(positions.tolist(), samples[0, positions].tolist(), strict=True))


def _one_hot(block: Array) -> bool:
    """Whether each row is one 1 among zeros, [rows, components]."""
    if block.ndim != 2 or block.shape[1] < 2 or np.count_nonzero(block[0] == 1) != 1:
        return False
    ones = block == 1
    return bool((ones.sum(axis=1) == 1).all() and (ones | (block == 0)).all())


def _of_integers(values: Array) -> dict[str, Any]:
    if not values.size:
        return {}
    low, high, n = int(values.min()), int(values.max()), values.size
    # Differences from the lowest: exact in 64 bits without a sign, where sums and casts wrap around.
    above = values.astype(np.int64).view(np.uint64) - np.uint64(low % (1 << 64))
    found: dict[str, Any] = {"lowest": low, "highest": high}
    if high - low < _NARROW:
        numbers = np.bincount(above.view(np.int64))
        steps = np.flatnonzero(numbers)
        occurs = numbers[steps]
        total, squares = int(occurs @ steps), int(occurs @ steps**2)
        found["total"] = Fraction(n * low + total)
        found["squares"] = Fraction(squares + 2 * low * total + n * low**2)
    else:
        steps, occurs = np.unique(above, return_counts=True)
        halves = int((above >> np.uint64(32)).sum()), int((above & np.uint64(0xFFFFFFFF)).sum())
        found["total"] = Fraction(n * low + (halves[0] << 32) + halves[1])
        center, _, squares_about = _about_their_mean(above.astype(np.float64))
        found["squares"] = _squares(found["total"], squares_about, low + center, n)
    found["counts"] = None
    if steps.size <= MOST_DISTINCT:
        found["counts"] = {low + step: k for step, k in zip(steps.tolist(), occurs.tolist(), strict=True)}
    return found


def _of_floats(values: Array) -> dict[str, Any]:
    finite = np.isfinite(values)
    found: dict[str, Any] = {"counts": None}
    if not finite.all():
        found["nan"] = int(np.count_nonzero(np.isnan(values)))
        found["plus_inf"] = int(np.count_nonzero(values == np.inf))
        found["minus_inf"] = int(np.count_nonzero(values == -np.inf))
        values = values[finite]
    if not values.size:
        return found
    low, high = float(values.min()), float(values.max())
    middle = low / 2 + high / 2  # low + high may be infinite
    center, rest, squares_about = _about_their_mean(values.astype(np.float64) - middle)
    center += Fraction(middle)
    total = values.size * center + rest
    return {
        **found,
        "lowest": low,
        "highest": high,
        "total": total,
        "squares": _squares(total, squares_about, center, values.size),
        "whole": bool((values == np.floor(values)).all()),
    }


def _squares(total: Fraction, about: Fraction, center: Fraction, n: int) -> Fraction:
    """The sum of the squares of n values with this `total`, if that of their differences from `center` is
    `about`."""
    return about + 2 * center * (total - n * center) + n * center**2


def _about_their_mean(values: npt.NDArray[np.float64]) -> tuple[Fraction, Fraction, Fraction]:
    """The mean of `values` to rounding; the sum, and the sum of the squares, of the differences from it.

    They are scaled by a power of two meanwhile, since the square of a finite number may be infinite, or 0.
    """
    exponent = math.frexp(np.abs(values).max())[1]
    scaled = np.ldexp(values, -exponent)
    center = float(scaled.mean())
    scaled -= center
    unit = Fraction(2) ** exponent
    squares = float(np.square(scaled).sum())
    return unit * Fraction(center), unit * Fraction(float(scaled.sum())), unit**2 * Fraction(squares)


def root(square: Fraction) -> float:
    """The square root, also of a number whose square is beyond the range of floating point."""
    exponent = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(square / Fraction(4) ** exponent), exponent)
