"""Trainings on data of which some rows are left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.algorithm.header import StepDone
from hvd_train.algorithm.transformed_reader import InThread, TransformedReader
from hvd_train.algorithm.worker import Worker
from hvd_train.config import Config, DataConfig, ModelConfig, StopConfig
from hvd_train.data.numbering import Numbering
from hvd_train.data.screen import MARK
from hvd_train.errors import DataError
from hvd_train.record.reports import FaultReport, RoundReport, StopReport
from hvd_train.record.wording import closing_lines
from hvd_train.tasks.built_in import Regression
from tests.unit.data.shards import write_foreign
from tests.unit.data.test_skipped_damage import spoil_chunks
from tests.unit.run_reports import HEADER
from tests.unit.trainings import Remembered, small, train

ROWS = (40, 200)
"""Of the two files of `small`; with two ranks each has one."""


def spoilt(tmp_path: Path, *rows: int, name: str = "b.h5", **data: object) -> Config:
    """`small`, with these rows of a file not finite."""
    config = small(tmp_path)
    with h5py.File(tmp_path / name, "r+") as file:
        for row in rows:
            file["inputs"][row, 1] = np.nan
    options: dict[str, object] = {"path": config.data.path, "batch_size": 4, "not_finite": "skip", **data}
    return replace(config, data=DataConfig(**options))  # type: ignore[arg-type]


def faults(rank: Remembered) -> list[FaultReport]:
    return [fault for fault in rank.of(FaultReport) if fault.kind == "rows_left_out"]


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_rows_are_counted_for_each_epoch_and_rank(tmp_path: Path, reading: str) -> None:
    """An epoch is 30 steps, six rounds. Each rank has 120 rows; one has the last 80 of the larger file."""
    config = spoilt(tmp_path, 7, 8, 150, reading=reading)
    config = replace(config, stop=StopConfig(patience=0, max_rounds=18))
    ranks = train(config, 2)
    rounds = ranks[0].of(RoundReport)
    for epoch in range(3):
        assert sum(r.samples for r in rounds[6 * epoch : 6 * epoch + 6]) == sum(ROWS) - 3
    assert all(np.isfinite(r.loss) for r in rounds)
    for rank in ranks:
        (fault,) = faults(rank)
        assert fault.round == 6
        assert fault.ranks == (0, 1)
        assert fault.rows == {"not_finite": [1, 2], "damaged": [0, 0], "alone": [0, 0]}
        assert fault.message.startswith(
            "epoch 1: of 240 training rows there are left out 3 as they hold values that are not finite "
            f"(rank 0: 1, rank 1: 2); the first is {tmp_path / 'b.h5'}: `inputs` holds nan in row "
        )
        (stop,) = rank.of(StopReport)
        assert stop.left_out == {"not_finite": 9}
        assert (
            "left out  9 rows that hold values that are not finite, in all epochs together"
            in closing_lines(HEADER, stop)
        )


def test_a_run_that_ends_within_an_epoch_reports_what_it_left_out(tmp_path: Path) -> None:
    config = spoilt(tmp_path, *range(120))  # those of rank 1
    (rank, _) = train(replace(config, stop=StopConfig(patience=0, max_rounds=2)), 2)
    (fault,) = faults(rank)
    assert fault.rows == {"not_finite": [0, 40], "damaged": [0, 0], "alone": [0, 0]}
    assert fault.message.startswith(
        "epoch 1, so far: of 240 training rows there are left out 40 as they hold values"
    )
    assert [r.samples for r in rank.of(RoundReport)] == [20, 20], "of rank 0 alone"
    assert rank.of(RoundReport)[0].zero_weight == (1,)


def test_a_training_whose_rows_are_all_left_out_ends(tmp_path: Path) -> None:
    spoilt(tmp_path, *range(40), name="a.h5")
    config = replace(spoilt(tmp_path, *range(200)), stop=StopConfig(patience=0, max_rounds=30))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["inputs"][:] = np.nan
    with pytest.raises(DataError, match=r"each of the 240 training rows was left out; expected at least 1"):
        train(config, 2)


def test_validation_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    """The last 24 of 240 rows, cut off in blocks, are for validation: row 199 of b.h5 is the last of them."""
    config = spoilt(tmp_path, 199, validation=0.1)
    config = replace(
        config,
        evaluate=replace(config.evaluate, every_rounds=1, batch_size=3),
        stop=StopConfig(patience=0, max_rounds=3),
    )
    one, two = train(config, 1), train(replace(config, name="two"), 2)
    for ranks in (one, two):
        (fault,) = faults(ranks[0])
        assert fault.message == (
            "1 of 24 validation rows are left out of every evaluation: they hold values that are not finite; "
            f"the first is {tmp_path / 'b.h5'}: `inputs` holds nan in row 199."
        )
        assert fault.rows == {}


def test_a_run_that_goes_on_leaves_out_the_same_rows(tmp_path: Path) -> None:
    config = spoilt(tmp_path, 7, 8, 150)
    config = replace(config, stop=StopConfig(patience=0, max_rounds=16))
    whole = train(config, 1)[0]
    parted = replace(config, name="parted", stop=StopConfig(patience=0, max_rounds=7))
    first = train(parted, 1)[0]
    second = train(replace(parted, resume="auto", stop=config.stop), 1)[0]
    seen = [r.samples for r in (*first.of(RoundReport), *second.of(RoundReport))]
    assert seen == [r.samples for r in whole.of(RoundReport)]
    assert [r.loss for r in second.of(RoundReport)] == [r.loss for r in whole.of(RoundReport)][7:]


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_damaged_rows_are_reported_once_for_each_file(tmp_path: Path, reading: str) -> None:
    """One file, of which each of two ranks has a half; chunks of 8 rows."""
    config = small(tmp_path)
    path = write_foreign(tmp_path / "a.h5", 160, chunks=(8, 3), compression="gzip")
    spoil_chunks(path, "inputs", 16, 24, 120)
    (tmp_path / "b.h5").unlink()
    data = DataConfig(path=str(path), batch_size=4, reading=reading, on_damage="skip")  # type: ignore[arg-type]
    config = replace(config, data=data, stop=StopConfig(patience=0, max_rounds=8))
    ranks = train(config, 2)
    faults = ranks[0].of(FaultReport)
    assert [(fault.kind, fault.round, fault.ranks) for fault in faults] == [
        ("damaged_rows", 1, (0, 1)),
        ("rows_left_out", 4, (0, 1)),
    ]
    assert "Left out of training: rows 16 to 31, 120 to 127." in faults[0].message
    assert faults[0].message.startswith(f"{path}: dataset `inputs`, rows 16 to 23: ")
    assert faults[1].rows["damaged"] == [16, 8]
    assert faults[1].message.startswith(
        "epoch 1: of 160 training rows there are left out 24 as they cannot be read or are not what was "
        "written (rank 0: 16, rank 1: 8)"
    )
    left_out = ranks[0].of(StopReport)[0].left_out
    assert left_out["damaged"] == 48
    assert sum(r.samples for r in ranks[0].of(RoundReport)) == 320 - sum(left_out.values())


class Batches:
    """A reader of one epoch, whose batches are given by their marks."""

    mode, restarted, left = "memory", False, 3

    def __init__(self, *marks: list[int]) -> None:
        self.num_samples = sum(map(len, marks))
        self._marks = iter(marks)

    def next_batch(self, size: int) -> dict[str, np.ndarray] | None:
        marks = next(self._marks, None)
        if marks is None:
            return None
        return {"x": np.arange(len(marks)), MARK: np.array(marks, np.uint8)}

    def start_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, object]:
        return {"epoch": 0}


def transformed(reader: Batches) -> TransformedReader:
    task = Regression(ModelConfig())
    return TransformedReader(reader, InThread(task, 0), Numbering([]), batch_size=3)  # type: ignore[arg-type]


def test_a_batch_that_becomes_empty_or_a_single_row() -> None:
    steps = []

    def step(batches: list) -> StepDone:
        if batches:
            steps.append([batch["x"].tolist() for batch in batches])
        return StepDone(0.0, sum(map(len, steps[-1])) if batches else 0)

    reader = transformed(Batches([1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0]))
    worker = Worker(reader, step, batch_size=3, accumulate=1, samples_per_rank=[100])
    works = [worker.run(1) for _ in range(5)]
    assert steps == [[[0, 1]], [[1, 2]], [[0]]], "a batch of one row alone is used as it is"
    assert [work.samples for work in works] == [0, 0, 2, 2, 1]
    assert [work.left_out.get("not_finite", 0) for work in works] == [3, 2, 1, 1, 0]
    assert worker.left_out == {"not_finite": 7, "alone": 1}
    steps.clear()
    reader = transformed(Batches([1, 1, 1], [0, 0, 0], [0, 0, 1]))
    worker = Worker(reader, step, batch_size=3, accumulate=3, samples_per_rank=[100])
    assert worker.run(1).samples == 5
    assert steps == [[[0, 1, 2], [0, 1]]], "an empty batch does not end the step"
