"""Summaries of values are what numpy finds, for ordinary and for hostile arrays, however they are cut."""

from __future__ import annotations

import itertools
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_train.data.values import MOST_COMPONENTS, Values, join, values_of

Array = npt.NDArray[Any]
TYPES = ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")


def exact(values: Array) -> tuple[float, float]:
    """Mean and standard deviation by rational arithmetic."""
    numbers = [Fraction(value) for value in values.reshape(-1).tolist()]
    mean = sum(numbers, Fraction(0)) / len(numbers)
    square = sum(((x - mean) ** 2 for x in numbers), Fraction(0)) / len(numbers)
    digits = 1 << 2400  # of the root, in binary: below the smallest number of float64
    return float(mean), float(Fraction(math.isqrt(int(square * digits)), math.isqrt(digits)))


def check(values: Array) -> None:
    found = values_of(values)
    mean, deviation = exact(values)
    assert (found.rows, found.count, found.finite) == (len(values), values.size, values.size)
    assert (found.lowest, found.highest) == (values.min(), values.max())
    spread = float(found.highest or 0) - float(found.lowest or 0)
    assert found.mean == pytest.approx(mean, rel=1e-14, abs=1e-15 * spread)
    assert found.deviation == pytest.approx(deviation, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_summarised_exactly(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(57, 3)).astype(dtype) if dtype[0] == "f" else rng.integers(0, 2, (57, 3))
    check(values.astype(dtype))
    if dtype[0] in "ui":
        info = np.iinfo(dtype)
        check(rng.integers(info.min, info.max, (57, 3), dtype, endpoint=True))
        check(np.array([info.min, info.max], dtype))
        check(np.array([info.max, info.max - 1, info.max], dtype))


@pytest.mark.parametrize(
    "values",
    [
        1e9 + np.random.default_rng(0).normal(size=5000),
        np.float32(1e9) + 64 * np.arange(30, dtype="f4"),
        1_700_000_000_000_000_000 + np.random.default_rng(0).integers(-900, 900, 3000) * 100,
        np.array([1.7e308, -1.7e308, 1.7e308]),
        np.array([5e-324, 0, 1e-323]),
        np.array([1e-200, 3e-200]),
        np.array([1e300, 1, 1]),
        np.array([65504, -65504, 1e-7], "f2"),
        np.full(10, 0.1),
        np.array([3.5]),
    ],
)
def test_hostile_values(values: Array) -> None:
    check(values)


def test_values_that_are_not_finite_and_a_fill_value_are_counted_apart() -> None:
    values = np.array([[np.nan, 1, -999], [np.inf, 3, -999], [-np.inf, np.inf, 5]])
    found = values_of(values, fill=-999)
    assert (found.count, found.nan, found.plus_inf, found.minus_inf, found.filled) == (9, 1, 2, 1, 2)
    assert (found.finite, found.lowest, found.highest, found.mean) == (3, 1, 5, 3)
    assert found.deviation == pytest.approx(math.sqrt(8 / 3), rel=1e-15)
    nothing = values_of(np.full((4, 2), np.nan, "f4"))
    assert (nothing.nan, nothing.finite, nothing.lowest, nothing.mean, nothing.deviation) == (
        8,
        0,
        None,
        None,
        None,
    )
    assert nothing.magnitude == 0
    labels = values_of(np.array([-100, 0, 2, 2]), fill=-100)
    assert (labels.counts, labels.filled, labels.lowest) == ({0: 1, 2: 2}, 1, 0)
    assert values_of(np.array([7, 7], "u1"), fill=-100).filled == 0, "which its type does not have"


def test_no_rows_and_no_components() -> None:
    assert values_of(np.zeros((0, 3))) == Values() == join([])
    empty = values_of(np.zeros((4, 0), "i8"))
    assert (empty.rows, empty.count, empty.components, empty.constant, empty.mean) == (4, 0, 0, {}, None)
    assert join([Values(), empty, Values()]) == empty


def test_integers_and_booleans_are_counted_up_to_1000_different_ones() -> None:
    assert values_of(np.array([True, False, True])).counts == {0: 1, 1: 2}
    assert values_of(np.array([[-3, 2**62], [2**62, 5]])).counts == {-3: 1, 5: 1, 2**62: 2}
    assert values_of(np.array([2**64 - 1, 0], "u8")).counts == {0: 1, 2**64 - 1: 1}
    assert values_of(np.arange(1001)).counts is None
    thousand = join([values_of(np.arange(600)), values_of(np.arange(400, 1000))])
    assert thousand.counts == {i: 2 if 400 <= i < 600 else 1 for i in range(1000)}
    assert join([thousand, values_of(np.array([1000]))]).counts is None
    assert values_of(np.array([1.0])).counts is None
    assert join([values_of(np.array([1.0])), values_of(np.array([1]))]).counts is None


def test_constant_components() -> None:
    rows = np.array([[1, 2.5, np.nan, 0], [1, 2.5, np.nan, 1]])
    found = values_of(rows)
    assert found.constant is not None
    assert list(found.constant) == [0, 1, 2]
    assert (found.constant[0], found.constant[1]) == (1, 2.5)
    other = rows.copy()
    other[:, 1] = 3
    together = join([found, values_of(other)])
    assert together.constant is not None
    assert list(together.constant) == [0, 2], "each block has another constant"
    assert values_of(np.array([4, 4])).constant == {0: 4}
    assert values_of(np.zeros((2, MOST_COMPONENTS + 1))).constant is None
    assert len(values_of(np.zeros((2, 2, MOST_COMPONENTS // 2))).constant or ()) == MOST_COMPONENTS
    unlike = join([values_of(np.zeros((2, 3))), values_of(np.zeros((2, 4)))])
    assert (unlike.components, unlike.constant, unlike.count) == (None, None, 14)


@pytest.mark.parametrize(
    ("values", "one_hot", "whole"),
    [
        (np.eye(3), True, True),
        (np.eye(3, dtype=bool), True, True),
        (np.eye(4, 3), False, True),
        (np.eye(3)[..., None], False, True),
        (np.array([[1, 0.5], [0, 1]]), False, False),
        (np.array([[1, -1], [0, 1]]), False, True),
        (np.array([[1, 1], [0, 1]]), False, True),
        (np.array([[np.inf, -np.inf], [0, 1]]), False, True),
        (np.ones((3, 1)), False, True),
        (np.array([1.0, 2.0]), False, True),
        (np.array([1.0, np.nan]), False, True),
        (np.array([1e300, 0.25]), False, False),
    ],
)
def test_one_hot_rows_and_whole_numbers(values: Array, one_hot: bool, whole: bool) -> None:
    found = values_of(values)
    assert (found.one_hot, found.whole) == (one_hot, whole)
    assert join([found, values_of(np.eye(3))]).one_hot == one_hot


NUMBERS = {
    "f8": st.floats(allow_nan=True, allow_infinity=True),
    "f2": st.floats(width=16),
    "i8": st.integers(-(2**63), 2**63 - 1),
    "u8": st.integers(0, 2**64 - 1),
    "u1": st.integers(0, 255),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_the_order_and_the_cuts_of_blocks_do_not_matter(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(NUMBERS)))
    numbers = data.draw(st.lists(NUMBERS[dtype], min_size=1, max_size=40))
    values = np.array(numbers, dtype)
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=4))
    edges = sorted({0, len(values), *cuts})
    blocks = [values_of(values[a:b]) for a, b in itertools.pairwise(edges)]
    joined = join(blocks)
    assert join([join(blocks[:2]), join(blocks[2:])]).figures() == joined.figures()
    assert join(reversed(blocks)).figures() == joined.figures()
    whole = values_of(values)
    assert joined.counts == whole.counts
    finite = values[np.isfinite(values)]
    assert joined.finite == finite.size
    if finite.size:
        mean, deviation = exact(finite)
        spread = float(finite.max()) - float(finite.min()) if dtype != "f8" else float(np.abs(finite).max())
        for found in (joined, whole):
            assert found.mean == pytest.approx(mean, rel=1e-13, abs=1e-13 * spread)
            assert found.deviation == pytest.approx(deviation, rel=1e-11, abs=1e-13 * spread)


def test_blocks_of_large_values_with_small_noise_join_as_one() -> None:
    """Where sums of squares in float64 would leave no digit of the deviation."""
    values = 1e9 + 1e-3 * np.random.default_rng(0).normal(size=20_000)
    joined = join([values_of(block) for block in np.array_split(values, 177)])
    assert joined.deviation == pytest.approx(exact(values)[1], rel=1e-12)


def test_a_summary_can_be_sent_and_gives_plain_numbers() -> None:
    found = values_of(np.array([[1, 5], [1, 7]], "i2"))
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.figures() == {
        "rows": 2,
        "count": 4,
        "nan": 0,
        "plus_inf": 0,
        "minus_inf": 0,
        "filled": 0,
        "lowest": 1,
        "highest": 7,
        "mean": 3.5,
        "deviation": pytest.approx(math.sqrt(6.75)),
        "components": 2,
        "constant": 1,
    }
    assert {type(value) for value in found.figures().values()} == {int, float}
