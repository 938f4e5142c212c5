"""Where the values that slice steps keep go when ranks are lost."""

from __future__ import annotations

import pytest

from hvd_train.comm.slice_state import deal


def test_in_shared_memory_every_owner_reads_its_own() -> None:
    assert list(deal([(0, 10)] * 3, [(0, 4), (4, 7), (7, 10)], 10)) == [
        (0, 4, 0, 0),
        (4, 7, 1, 1),
        (7, 10, 2, 2),
    ]


def test_private_values_go_from_rank_to_rank_and_those_of_the_lost_rank_are_gone() -> None:
    """[3, 6) was on a rank that is lost."""
    assert list(deal([(0, 3), (6, 8), (8, 10)], [(0, 4), (4, 7), (7, 10)], 10)) == [
        (0, 3, 0, 0),
        (3, 4, None, 0),
        (4, 6, None, 1),
        (6, 7, 1, 1),
        (7, 8, 1, 2),
        (8, 10, 2, 2),
    ]


def test_between_hosts_the_lowest_rank_that_reads_them_sends_them() -> None:
    """Ranks 0 and 2 see the first half, rank 1 the second."""
    assert list(deal([(0, 6), (6, 12), (0, 6)], [(0, 4), (4, 8), (8, 12)], 12)) == [
        (0, 4, 0, 0),
        (4, 6, 0, 1),
        (6, 8, 1, 1),
        (8, 12, 1, 2),
    ]


@pytest.mark.parametrize("numel", [0, 1, 2])
def test_fewer_elements_than_ranks(numel: int) -> None:
    owned = [(min(r, numel), min(r + 1, numel)) for r in range(3)]
    assert list(deal(owned, owned, 3)) == [(r, r + 1, r, r) for r in range(numel)]


def test_pieces_have_a_largest_size() -> None:
    assert list(deal([(2, 9), (2, 9)], [(2, 7), (7, 9)], 2)) == [
        (2, 4, 0, 0),
        (4, 6, 0, 0),
        (6, 7, 0, 0),
        (7, 9, 1, 1),
    ]
