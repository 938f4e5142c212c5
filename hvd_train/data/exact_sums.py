"""Sums whose bits do not depend on the order of what is added."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from hvd_train.data.format import Array

Floats = npt.NDArray[np.float64]

_BITS = 32
"""Of a digit: as many additions of one fit into 64 bits."""

_MASK = (1 << _BITS) - 1

_MANTISSA = 53


class ExactSums:
    """Sums of finite float64 numbers, [size], each an integer in digits of 32 bits with a place for every
    exponent that occurs. Nothing is rounded. Up to 2^28 numbers may be added to each.

    Args:
        size: how many sums.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._digits: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def places(self) -> tuple[int, int]:
        """The first place of a digit and the one after the last; both 0 if all sums are 0."""
        return (min(self._digits), max(self._digits) + 1) if self._digits else (0, 0)

    def add(self, numbers: Floats, exponents: Array | int = 0) -> None:
        """Adds numbers * 2^exponents, [size]."""
        fractions, exponent = np.frexp(numbers)
        whole = np.ldexp(fractions, _MANTISSA).astype(np.int64)
        place, shift = np.divmod(exponent.astype(np.int64) - _MANTISSA + exponents, _BITS)
        low, high = (whole & _MASK) << shift, (whole >> _BITS) << shift  # below 2^63 and 2^53
        middle = (low >> _BITS) + (high & _MASK)
        for at in np.unique(place[whole != 0]).tolist():
            here = place == at
            for offset, digit in enumerate((low & _MASK, middle, high >> _BITS)):
                self._place(at + offset)[here] += digit[here]

    def _place(self, at: int) -> npt.NDArray[np.int64]:
        return self._digits.setdefault(at, np.zeros(self._size, np.int64))

    def table(self, first: int, stop: int) -> Floats:
        """The digits at the places from `first` up to `stop`, [places, size], and one place more for what is
        carried; each below 2^32. Tables of several sums may be added: as long as there are fewer than 2^20 of
        them, that is exact too."""
        table, carry = np.zeros((stop - first + 1, self._size)), np.zeros(self._size, np.int64)
        for row, place in enumerate(range(first, stop)):
            digit = carry + self._digits.get(place, 0)
            table[row], carry = digit & _MASK, digit >> _BITS
        table[-1] = carry
        return table


def sums_of(table: Floats, first: int) -> list[Fraction]:
    """The sums of a `table` that begins at the place `first`."""
    whole = [0] * table.shape[1]
    for digits in reversed(table):
        whole = [(number << _BITS) + int(digit) for number, digit in zip(whole, digits.tolist(), strict=True)]
    unit = Fraction(2) ** (_BITS * first)
    return [unit * number for number in whole]
