"""Damaged folders of runs: one error of ours, or the state that was saved."""

from __future__ import annotations

import pytest

from tests.faults import mutate_checkpoints
from tests.faults.mutate_checkpoints import BAD, count


@pytest.mark.parametrize("corrected", [False, True])
def test_no_mutant_is_accepted_or_raises_a_foreign_error(corrected: bool) -> None:
    """`python -m tests.faults.mutate_checkpoints` makes thousands."""
    mutate_checkpoints.shown.clear()
    counts = count(120, seed=7, corrected=corrected)
    assert {bad: sum(found[bad] for found in counts.values()) for bad in BAD} == dict.fromkeys(BAD, 0), (
        mutate_checkpoints.shown
    )
    assert sum(found["refused"] for found in counts.values()) > 20
    assert sum(found["the same"] for found in counts.values()) > 20
