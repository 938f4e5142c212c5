"""Random numbers of rows: the same whatever else is in the batch, spread as they should be, and fixed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hvd_train.tasks.draws import Draws


def test_the_numbers_of_a_row_depend_on_seed_epoch_and_row_alone() -> None:
    whole = Draws(3, 2, range(1000))
    parts = [Draws(3, 2, [5, 999, 0]), Draws(3, 2, [999])]
    for _ in range(2):
        uniform, normal = whole.uniform((3, 5)), whole.normal((7,), mean=2.0, std=0.5)
        integers, chance = whole.integers(-3, 9, (2, 2)), whole.chance(0.3)
        for part, rows in zip(parts, ([5, 999, 0], [999]), strict=True):
            assert torch.equal(part.uniform((3, 5)), uniform[rows])
            torch.testing.assert_close(
                part.normal((7,), mean=2.0, std=0.5), normal[rows], rtol=1e-6, atol=1e-6
            )
            assert torch.equal(part.integers(-3, 9, (2, 2)), integers[rows])
            assert torch.equal(part.chance(0.3), chance[rows])
    for other in (Draws(4, 2, [5]), Draws(3, 1, [5]), Draws(3, 2, [6]), Draws(32, 0, [5])):
        assert not torch.equal(other.uniform((8,)), Draws(3, 2, [5]).uniform((8,)))
        assert other.seed(0) != Draws(3, 2, [5]).seed(0)


def test_shapes_and_types() -> None:
    draws = Draws(0, 0, [7, 8, 9])
    assert len(draws) == 3
    assert bool(draws)
    for numbers, dtype in (
        (draws.uniform(), torch.float32),
        (draws.normal(), torch.float32),
        (draws.integers(0, 2), torch.int64),
        (draws.chance(0.5), torch.bool),
    ):
        assert (numbers.shape, numbers.dtype) == ((3,), dtype)
    assert draws.uniform((2, 1)).shape == draws.normal((2, 1)).shape == (3, 2, 1)
    assert draws.integers(0, 2, (0,)).shape == (3, 0)
    large = Draws(0, 0, [2**62]).uniform((40_001,))  # more than are made at once, and odd
    assert large.unique().numel() > 39_900


def test_numbers_are_spread_as_they_should_be() -> None:
    draws = Draws(1, 0, range(2000))
    uniform = draws.uniform((500,))
    assert 0 <= uniform.min() < 1e-5
    assert 1 - 1e-5 < uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=2e-3)
    assert uniform.var() == pytest.approx(1 / 12, abs=1e-3)
    by_row = torch.corrcoef(uniform[:100])
    assert (by_row - torch.eye(100)).abs().max() < 0.25
    by_number = torch.corrcoef(uniform[:, :100].T)
    assert (by_number - torch.eye(100)).abs().max() < 0.15
    normal = draws.normal((500,))
    assert normal.mean() == pytest.approx(0, abs=5e-3)
    assert normal.std() == pytest.approx(1, abs=5e-3)
    assert (normal.abs() < 1).double().mean() == pytest.approx(0.6827, abs=3e-3)
    assert torch.isfinite(normal).all()
    counts = draws.integers(-2, 5, (500,)).add(2).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert ((counts - 1e6 / 7) ** 2 / (1e6 / 7)).sum() < 22.5  # chi squared, 6 degrees of freedom: 0.1 %
    assert draws.chance(0.2, (500,)).double().mean() == pytest.approx(0.2, abs=2e-3)
    ranged = draws.uniform((500,), -3.0, 5.0)
    assert (ranged.min() >= -3, ranged.max() <= 5) == (True, True)
    assert ranged.mean() == pytest.approx(1.0, abs=0.02)


def test_bits_of_neighbouring_rows_are_not_alike() -> None:
    """Row numbers follow one another, so do counters: each bit must change in half of the cases."""
    words = Draws(0, 0, range(4096)).integers(0, 1 << 32, (16,))
    for other in (words[1:] ^ words[:-1], words[:, 1:] ^ words[:, :-1]):
        for bit in range(32):
            assert ((other >> bit) & 1).double().mean() == pytest.approx(0.5, abs=0.02)


def test_the_numbers_of_earlier_versions_are_kept() -> None:
    """A resumed run goes on with the same augmentation."""
    draws = Draws(7, 3, [0, 123_456_789])
    assert draws.integers(0, 1000, (3,)).tolist() == [[10, 784, 463], [773, 730, 62]]
    assert (draws.uniform() * 2**24).tolist() == [8673322.0, 3024079.0]
    assert [draws.seed(i) for i in range(2)] == [6328720581699856835, 5751138177046617196]


def test_an_empty_range_is_refused() -> None:
    draws = Draws(0, 0, [1])
    for low, high in ((3, 3), (4, 3), (0, 2**32 + 1)):
        with pytest.raises(ValueError, match=rf"integers from {low} up to {high}: expected 1 to 2\*\*32 of"):
            draws.integers(low, high)


def test_global_generators_are_those_of_a_row_within_the_loop() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state()

    def drawn(rows: list[int]) -> dict[int, tuple[float, float, float]]:
        draws = Draws(5, 1, rows)
        return {
            rows[i]: (torch.rand(()).item(), float(np.random.rand()), random.random()) for i in draws.seeded()
        }

    whole = drawn([4, 5, 6])
    assert len({value for values in whole.values() for value in values}) == 9
    assert drawn([6, 4]) == {row: whole[row] for row in (6, 4)}
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.rand() == np.random.RandomState(1).rand()
    assert random.random() == random.Random(1).random()
    seed = Draws(5, 1, [4]).seed(0)
    assert torch.rand((), generator=torch.Generator().manual_seed(seed)).item() == whole[4][0]
