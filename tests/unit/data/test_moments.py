"""Mean and deviation of groups of values: exact, and the same bits however the rows are dealt to ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.data import moments
from hvd_train.data.deal import Span
from hvd_train.data.exact_sums import ExactSums, sums_of
from hvd_train.data.format import FieldSpec
from hvd_train.data.grouping import Grouping, shape_of_moments, usual_grouping
from hvd_train.data.moments import Moments, mean_and_deviation, moments_of
from hvd_train.data.values import root

RNG = np.random.default_rng(3)
NORMAL = RNG.normal(size=(101, 6))
ROWS = (37, 0, 3, 61)
"""Of the files; together those of `NORMAL`."""

Figures = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def with_gaps() -> npt.NDArray[np.float64]:
    values = NORMAL.copy()
    values[RNG.random(values.shape) < 0.1] = np.nan
    values[5, 2], values[99, 2], values[:, 4] = np.inf, -np.inf, np.nan
    return values


CASES: dict[str, tuple[npt.NDArray[Any], Grouping]] = {
    "components": (NORMAL.astype("f4"), "component"),
    "half": (NORMAL.astype("f2"), "component"),
    "scalars": (NORMAL[:, 0], "component"),
    "far from 0": (1e9 + NORMAL, "component"),
    "farther than float64 can square": (1e14 + 1000 * NORMAL, "all"),
    "far outliers": (np.where(RNG.random(NORMAL.shape) < 0.02, 1e12, NORMAL), "component"),
    "huge": (1e300 * NORMAL, "component"),
    "tiny": (1e-310 * NORMAL, "component"),
    "of all magnitudes": (NORMAL * np.array([1e300, 1e150, 1, 1e-20, 1e-200, 1e-310]), "component"),
    "gaps": (with_gaps(), "component"),
    "gaps in all": (with_gaps(), "all"),
    "bytes": (RNG.integers(0, 256, (101, 3, 5, 4), dtype="u1"), "channel"),
    "words": (RNG.integers(60000, 65536, (101, 5, 4), dtype="u2"), "all"),
    "truths": (NORMAL > 0, "component"),
    "long": (RNG.integers(2**40, 2**41, (101, 2)), "component"),
    "unsigned": (RNG.integers(0, 2**32, (101, 2), dtype="u4"), "component"),
    "series": (RNG.normal([[2.0], [9.0]], [[1.0], [3.0]], (101, 2, 8)), "channel"),
    "no components": (np.zeros((101, 0)), "component"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_BLOCK_VALUES", 40)


def in_files(values: npt.NDArray[Any], folder: Path) -> tuple[list[Span], FieldSpec]:
    spans = []
    for i, rows in enumerate(np.split(values, np.cumsum(ROWS)[:-1])):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file["x"] = rows
        spans.append(Span(str(folder / f"{i}.h5"), 0, len(rows)))
    return spans, FieldSpec(shape=values.shape[1:], dtype=values.dtype.name)


def figures(parts: list[Moments]) -> Figures:
    """Of all parts, joined as ranks join them."""

    def sums(every: list[ExactSums]) -> list[Fraction]:
        first = min(part.places[0] for part in every)
        stop = max(part.places[1] for part in every)
        return sums_of(np.sum([part.table(first, stop) for part in every], axis=0), first)

    return mean_and_deviation(
        np.sum([part.counts for part in parts], axis=0),
        np.min([part.lowest for part in parts], axis=0),
        np.max([part.highest for part in parts], axis=0),
        sums([part.total for part in parts]),
        sums([part.squares for part in parts]),
    )


def expected(values: npt.NDArray[Any], grouping: Grouping) -> Figures:
    """By rational numbers."""
    groups = math.prod(shape_of_moments(values.shape[1:], grouping))
    width = math.prod(values.shape[1:]) // max(1, groups)
    means, deviations = np.zeros(groups), np.ones(groups)
    for i, group in enumerate(np.moveaxis(values.reshape(len(values), groups, width), 1, 0)):
        numbers = [Fraction(x) for x in group.astype(float).ravel().tolist() if math.isfinite(x)]
        if numbers:
            mean = sum(numbers, Fraction(0)) / len(numbers)
            means[i] = mean
            deviations[i] = root(sum((x - mean) ** 2 for x in numbers) / len(numbers)) or 1
    return means, deviations


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_for_any_number_of_ranks(case: str, tmp_path: Path) -> None:
    values, grouping = CASES[case]
    spans, field = in_files(values, tmp_path)
    alone = figures([moments_of(spans, "x", field, grouping)])
    for ranks in (2, 3, 5, 200):
        parts = [moments_of(spans, "x", field, grouping, rank, ranks) for rank in range(ranks)]
        for a, b in zip(alone, figures(parts), strict=True):
            assert a.tobytes() == b.tobytes()
        counts = np.sum([part.counts for part in parts], axis=0)
        assert counts.sum() == np.isfinite(values.astype(float)).sum(), "each value once"
    for found, right in zip(alone, expected(values, grouping), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-12)


def test_a_group_of_one_value_has_the_deviation_1() -> None:
    """Also of values whose sum is rounded."""
    values = np.tile([0.1, -7.0, np.nan, 1e300], (1000, 1))
    values[3, 0] = np.inf
    part = Moments(4)
    part.add(values[:, :, None])
    mean, deviation = figures([part])
    assert (mean.tolist(), deviation.tolist()) == ([0.1, -7.0, 0.0, 1e300], [1.0] * 4)


def test_only_the_given_rows_count(tmp_path: Path) -> None:
    spans, field = in_files(NORMAL, tmp_path)
    some = [Span(spans[3].shard, 1, 20), Span(spans[0].shard, 30, 37)]
    chosen = np.concatenate([NORMAL[41:60], NORMAL[30:37]])
    for found, right in zip(
        figures([moments_of(some, "x", field, "all")]), expected(chosen, "all"), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-12)


def test_sums_do_not_depend_on_the_order_and_are_exact() -> None:
    numbers = np.ldexp(RNG.normal(size=(300, 4)), RNG.integers(-1070, 1000, (300, 4)))
    numbers[0] = [0.0, -0.0, 5e-324, -np.finfo(float).max]
    exponents = RNG.integers(-900, 900, (300, 4))
    exact = [
        sum((Fraction(x) * Fraction(2) ** e for x, e in zip(xs, es, strict=True)), Fraction(0))
        for xs, es in zip(numbers.T.tolist(), exponents.T.tolist(), strict=True)
    ]
    for order in (np.arange(300), RNG.permutation(300)):
        sums = ExactSums(4)
        for at in order:
            sums.add(numbers[at], exponents[at])
        first, stop = sums.places
        assert sums_of(sums.table(first, stop), first) == exact
        assert np.abs(sums.table(first, stop)).max() < 2**32
    assert sums_of(ExactSums(2).table(0, 0), 0) == [0, 0]


@pytest.mark.parametrize(
    ("shape", "grouping"),
    [
        ((), "component"),
        ((7,), "component"),
        ((28, 28), "all"),
        ((3, 8, 8), "channel"),
        ((8, 8, 3), "all"),
        ((2, 4, 4, 4), "channel"),
    ],
)
def test_the_usual_grouping(shape: tuple[int, ...], grouping: Grouping) -> None:
    assert usual_grouping(shape) == grouping
    assert np.broadcast_shapes(shape, shape_of_moments(shape, grouping)) == shape
