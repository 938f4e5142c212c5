"""What a run counts over all of its starts."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from hvd_train.algorithm.header import Header, Row
from hvd_train.algorithm.progress import Progress
from hvd_train.config import EvaluateConfig
from hvd_train.errors import RunDirectoryError


def header(*epochs: float, samples: int = 8) -> Header:
    return Header(np.array([astuple(Row(samples=samples, loss_sum=0.0, epoch=epoch)) for epoch in epochs]))


def test_ranks_that_pass_epochs_together() -> None:
    progress = Progress()
    progress.after_round(header(0.5, 0.5))
    assert (progress.rounds, progress.samples, progress.epoch, progress.epochs) == (1, 16, 0.5, 0)
    assert progress.passes == []
    assert progress.state_dict() == {"rounds": 1, "samples": 16, "looked_at_epoch": 0}


def test_epochs_of_their_own_count_by_their_rows() -> None:
    """Ten rows that were read three times and thirty that were read once are one and a half passes."""
    progress = Progress(rows=[10, 30, 0])
    progress.after_round(header(3.0, 1.0, 0.0))
    assert (progress.epoch, progress.epochs, progress.passes) == (1.5, 1, [3.0, 1.0, 0.0])
    progress.after_round(header(4.0, 2.0, 0.0))
    assert (progress.epoch, progress.epochs) == (2.5, 2)
    again = Progress(rows=[10, 30])
    again.load_state_dict(progress.state_dict())
    assert (again.rounds, again.samples, again.epoch) == (2, 48, 2.5)
    with pytest.raises(RunDirectoryError, match="unknown field `more`"):
        again.load_state_dict({**progress.state_dict(), "more": 1})


def test_an_evaluation_is_due_in_the_round_that_completes_an_epoch() -> None:
    progress, every = Progress(rows=[10, 30]), EvaluateConfig(every_epochs=1, every_rounds=0)
    due = []
    for first, second in ((1.0, 0.5), (2.0, 0.5), (2.5, 0.75), (3.0, 1.75)):
        progress.after_round(header(first, second))
        due.append(progress.evaluation_is_due(every))
        if due[-1]:
            progress.evaluated()
    assert due == [False, False, True, True]
