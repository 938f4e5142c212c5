"""Each rank has random numbers of its own, and a resumed rank goes on with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hvd_train.run.random_state import RandomState, seed_rank


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def draw() -> list[float]:
    return torch.rand(4).tolist()


def test_ranks_and_seeds_draw_different_numbers() -> None:
    drawn = {}
    for seed in range(3):
        for rank in range(4):
            seed_rank(seed, rank)
            drawn[seed, rank] = tuple(draw())
    torch.manual_seed(0)
    drawn["parameters", 0] = tuple(draw())
    assert len(set(drawn.values())) == 13
    seed_rank(2, 3)
    assert tuple(draw()) == drawn[2, 3]


def test_a_saved_generator_goes_on() -> None:
    seed_rank(0, 1)
    draw()
    state = RandomState(0, 1, 2).state_dict()
    state = {**state, "torch": state["torch"].clone()}
    expected = draw()
    torch.manual_seed(99)
    RandomState(0, 1, 2).load_state_dict(state)
    assert draw() == expected


@pytest.mark.parametrize("place", [(0, 2), (1, 3)])
def test_the_state_of_another_place_is_not_taken(place: tuple[int, int]) -> None:
    """Two ranks of a larger world would draw the same numbers."""
    seed_rank(0, 1)
    state = RandomState(0, 1, 2).state_dict()
    state = {**state, "torch": state["torch"].clone()}
    elsewhere = draw()
    RandomState(0, *place).load_state_dict(state)
    first = draw()
    assert first != elsewhere
    seed_rank(0, place[0])
    assert first != draw(), "nor are the numbers those of the run's beginning"
