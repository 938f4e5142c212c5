"""What a rank does between averages, with ranks that have unequally many rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor, nn

from hvd_train.algorithm.header import StepDone
from hvd_train.algorithm.period.base import Seconds
from hvd_train.algorithm.transformed_reader import InThread, TransformedReader
from hvd_train.algorithm.worker import Worker, steps_per_epoch
from hvd_train.config import DataConfig
from hvd_train.config.data import LastBatch
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.tasks.base import Batch, Task
from tests.unit.data.shards import row_numbers, write_foreign

FIELDS = {"inputs": FieldSpec(shape=(3,), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}
ROWS = (23, 10, 0)
"""Rows of each rank."""


class Plain(Task):
    """Batches as they are read."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        return nn.Identity()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return batch["inputs"].mean(), len(batch["inputs"])


class Steps:
    """Stands for the optimizer: remembers the rows of each step; the loss of a row is its number."""

    def __init__(self) -> None:
        self.rows: list[list[list[int]]] = []

    def __call__(self, batches: Sequence[Batch]) -> StepDone:
        if not batches:
            return StepDone(0.0, 0)
        self.rows.append([row_numbers({k: v.numpy() for k, v in b.items()}) for b in batches])
        flat = [n for batch in self.rows[-1] for n in batch]
        return StepDone(float(sum(flat)), len(flat))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "a.h5", sum(ROWS))


@pytest.fixture(params=["memory", "stream"])
def readers(shard: Path, request: pytest.FixtureRequest) -> Iterator[list[Reader]]:
    """One for each rank, twice: the second three are for resuming."""
    made = []
    for _ in range(2):
        start = 0
        for rows in ROWS:
            part = [Span(str(shard), start, start + rows)] if rows else []
            made.append(make_reader(part, DataConfig(reading=request.param), 1, FIELDS, 1 << 30))
            start += rows
    yield made
    for reader in made:
        reader.close()


def made_of(
    reader: Reader,
    *,
    batch_size: int = 4,
    accumulate: int = 1,
    samples_per_rank: Sequence[int] = ROWS,
    last: LastBatch = "keep",
    own_epochs: bool = False,
) -> tuple[Worker, Steps]:
    steps = Steps()
    transformed = TransformedReader(
        reader, InThread(Plain(), 1), Numbering([]), batch_size=batch_size, last_batch=last
    )
    made = Worker(
        transformed,
        steps,
        batch_size=batch_size,
        accumulate=accumulate,
        samples_per_rank=samples_per_rank,
        last_batch=last,
        own_epochs=own_epochs,
    )
    return made, steps


def worker(reader: Reader, *, batch_size: int = 4, accumulate: int = 1) -> tuple[Worker, Steps]:
    return made_of(reader, batch_size=batch_size, accumulate=accumulate)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "steps"),
    [
        ((23, 10, 0), 4, 1, 6),
        ((24, 10), 4, 1, 6),
        ((25,), 4, 1, 6),  # the last has 5 rows
        ((25,), 4, 2, 3),
        ((26,), 4, 1, 7),
        ((5, 1), 4, 1, 1),
        ((25, 3), 1, 1, 25),
        ((23, 10), 4, 2, 3),
        ((1, 1), 64, 8, 1),
        ((8,), 4, 2, 1),
    ],
)
def test_an_epoch_is_as_long_as_that_of_the_largest_part(
    rows: tuple[int, ...], batch: int, accumulate: int, steps: int
) -> None:
    assert steps_per_epoch(rows, batch, accumulate) == steps


def test_ranks_cross_epochs_at_the_same_step_and_drop_no_row(readers: list[Reader]) -> None:
    """Six steps an epoch, rounds of four: epochs end within rounds; the smaller ranks idle in between."""
    workers = [worker(reader) for reader in readers[:3]]
    seen = []
    for _ in range(6):
        works = [w.run(4) for w, _ in workers]
        assert len({(w.epochs, w.progress) for w, _ in workers}) == 1
        seen.append(tuple(w.samples for w in works))
    assert workers[0][0].epochs == 4
    assert seen == [(16, 10, 0), (15, 8, 0), (15, 2, 0)] * 2
    for rank, (_, steps) in enumerate(workers):
        first = sum(ROWS[:rank])
        every = sorted(n for step in steps.rows for batch in step for n in batch)
        assert every == sorted([*range(first, first + ROWS[rank])] * 4)
        assert len(steps.rows) == 4 * -(-ROWS[rank] // 4), "no step without rows"


def test_one_round_may_hold_several_epochs(readers: list[Reader]) -> None:
    made, steps = worker(readers[1])
    work = made.run(15)
    assert (made.epochs, made.progress) == (2, 2.5)
    assert work.samples == 30
    assert work.loss_sum == sum(n for step in steps.rows for batch in step for n in batch)


def test_epochs_are_in_different_orders(readers: list[Reader]) -> None:
    made, steps = worker(readers[0])
    made.run(12)
    first, second = ([n for s in steps.rows[i : i + 6] for b in s for n in b] for i in (0, 6))
    assert sorted(first) == sorted(second)
    assert first != second


def test_accumulated_batches_are_one_step(readers: list[Reader]) -> None:
    made, steps = worker(readers[0], accumulate=3)
    works = [made.run(1) for _ in range(2)]
    assert [[len(b) for b in step] for step in steps.rows] == [[4, 4, 4], [4, 4, 3]]
    assert [w.samples for w in works] == [12, 11]
    assert made.epochs == 1
    small, taken = worker(readers[1], accumulate=3)
    assert [small.run(1).samples for _ in range(4)] == [10, 0, 10, 0]
    assert [[len(b) for b in step] for step in taken.rows] == [[4, 4, 2], [4, 4, 2]]


def test_a_rank_without_rows_only_counts(readers: list[Reader]) -> None:
    made, steps = worker(readers[2])
    work = made.run(13)
    assert (work.samples, work.loss_sum, made.epochs, steps.rows) == (0, 0.0, 2, [])
    assert made.progress == pytest.approx(2 + 1 / 6)


def test_ranks_with_epochs_of_their_own_pass_them_alone(readers: list[Reader]) -> None:
    workers = [made_of(reader, own_epochs=True) for reader in readers[:3]]
    works = [[w.run(5) for _ in range(3)] for w, _ in workers]
    assert [[work.steps for work in rank] for rank in works] == [[5] * 3, [5] * 3, [0] * 3]
    assert [[work.epoch for work in rank] for rank in works[1:]] == [
        pytest.approx([5 / 3, 10 / 3, 5]),
        [0] * 3,
    ]
    assert [w.epochs for w, _ in workers] == [2, 5, 0]
    assert works[0][2].epoch == pytest.approx(2.5)
    assert [[work.samples for work in rank] for rank in works[1:]] == [[18, 16, 16], [0] * 3]
    every = [n for step in workers[1][1].rows for batch in step for n in batch]
    assert [sorted(every[i : i + 10]) for i in range(0, 50, 10)] == [list(range(23, 33))] * 5


def test_a_round_in_seconds_has_at_least_one_step(readers: list[Reader]) -> None:
    workers = [made_of(reader, own_epochs=True)[0] for reader in readers[:3]]
    assert [w.run(Seconds(1e-9)).steps for w in workers] == [1, 1, 0]


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_rank_is_resumed_in_its_own_epoch(rank: int, cut: int, readers: list[Reader]) -> None:
    whole, expected = made_of(readers[rank], own_epochs=True)
    whole.run(cut)
    state = copy.deepcopy(whole.state_dict())
    expected.rows.clear()
    whole.run(9)
    again, steps = made_of(readers[rank + 3], own_epochs=True)
    again.load_state_dict(state)
    assert not again.restarted
    again.run(9)
    assert steps.rows == expected.rows
    assert (again.epochs, again.state_dict()) == (whole.epochs, whole.state_dict())
    together, _ = worker(readers[rank])
    together.load_state_dict(state)
    assert together.restarted, "its epoch may not be that of the others"


def test_seconds_are_measured(readers: list[Reader]) -> None:
    made, _ = worker(readers[0])
    work = made.run(6)
    assert work.data_s > 0
    assert work.compute_s > 0


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("cut", [0, 1, 4, 6, 9, 17])
def test_a_resumed_worker_goes_on_with_the_next_row(rank: int, cut: int, readers: list[Reader]) -> None:
    whole, expected = worker(readers[rank])
    whole.run(cut)
    state = copy.deepcopy(whole.state_dict())
    expected.rows.clear()
    rest = whole.run(20)
    again, steps = worker(readers[rank + 3])
    again.load_state_dict(state)
    assert not again.restarted
    assert (again.epochs, again.progress) == (state["epochs"], state["epochs"] + cut % 6 / 6)
    work = again.run(20)
    assert steps.rows == expected.rows
    assert (work.samples, work.loss_sum) == (rest.samples, rest.loss_sum)
    assert again.state_dict() == whole.state_dict()


def test_rows_that_were_dealt_anew_begin_the_epoch_anew(readers: list[Reader]) -> None:
    """The state of rank 1 is given to rank 0, as where the world has another size; and rank 1 keeps its rows,
    but must begin anew as well."""
    before, _ = worker(readers[1])
    before.run(8)
    state = copy.deepcopy(before.state_dict())
    moved, rows = worker(readers[0])
    stayed, others = worker(readers[4])
    for each in (moved, stayed):
        each.load_state_dict(state)
    assert (moved.restarted, stayed.restarted) == (True, False)
    for each in (moved, stayed):
        each.restart_epoch()
        assert (each.epochs, each.progress) == (1, 1.0)
        each.run(6)
        assert (each.epochs, each.progress) == (2, 2.0)
    assert sorted(n for s in rows.rows for b in s for n in b) == list(range(23))
    assert sorted(n for s in others.rows for b in s for n in b) == list(range(23, 33))


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_a_single_row_joins_the_batch_before_it(reading: str, tmp_path: Path) -> None:
    """25 and 11 rows in batches of 4 and 2 a step, to the end and cut short after each step."""
    path, rows = str(write_foreign(tmp_path / "b.h5", 36)), (25, 11)
    parts = [[Span(path, 0, 25)], [Span(path, 25, 36)]]
    data = DataConfig(reading=reading)  # type: ignore[arg-type]

    def make(rank: int) -> tuple[Worker, Steps]:
        reader = make_reader(parts[rank], data, 1, FIELDS, 1 << 30)
        return made_of(reader, accumulate=2, samples_per_rank=rows)

    for rank, sizes in enumerate(([[4, 4], [4, 4], [4, 5]], [[4, 4], [3]])):
        whole, steps = make(rank)
        whole.run(6)
        assert whole.epochs == 2
        assert [[len(b) for b in step] for step in steps.rows] == sizes * 2
        for done in range(1, 6):
            first, _ = make(rank)
            first.run(done)
            second, rest = make(rank)
            second.load_state_dict(first.state_dict())
            second.run(6 - done)
            assert second.epochs == 2
            assert rest.rows == steps.rows[len(steps.rows) - len(rest.rows) :]
            first.close()
            second.close()
        whole.close()


@pytest.mark.parametrize(
    ("last", "sizes", "steps"),
    [
        ("keep", ([4, 4, 4, 4, 4, 3], [4, 4, 2], [3]), 6),
        ("drop", ([4, 4, 4, 4, 4], [4, 4], [3]), 5),
        ("merge", ([4, 4, 4, 4, 7], [4, 6], [3]), 5),
    ],
)
def test_all_ranks_pass_to_the_next_epoch_at_the_same_step(
    last: LastBatch, sizes: tuple[list[int], ...], steps: int, tmp_path: Path
) -> None:
    """23, 10 and 3 rows in batches of 4: three epochs, and the last two of them resumed after each step."""
    path, rows = str(write_foreign(tmp_path / "b.h5", 36)), (23, 10, 3)
    parts = [[Span(path, 0, 23)], [Span(path, 23, 33)], [Span(path, 33, 36)]]

    def make(rank: int) -> tuple[Worker, Steps]:
        reader = make_reader(parts[rank], DataConfig(), 1, FIELDS, 1 << 30)
        return made_of(reader, samples_per_rank=rows, last=last)

    assert steps_per_epoch(rows, 4, 1, last) == steps
    for rank, expected in enumerate(sizes):
        whole, taken = make(rank)
        passed = []
        for _ in range(3 * steps):
            whole.run(1)
            passed.append(whole.progress)
        assert passed == pytest.approx([(i + 1) / steps for i in range(3 * steps)])
        assert [len(batch) for (batch,) in taken.rows] == expected * 3
        for done in range(1, 2 * steps):
            first, _ = make(rank)
            first.run(done)
            second, rest = make(rank)
            second.load_state_dict(first.state_dict())
            assert not second.restarted
            second.run(3 * steps - done)
            assert second.epochs == 3
            assert rest.rows == taken.rows[len(taken.rows) - len(rest.rows) :]


def test_rows_that_are_dropped_are_others_in_each_epoch(shard: Path) -> None:
    reader = make_reader([Span(str(shard), 0, 7)], DataConfig(), 1, FIELDS, 1 << 30)
    made, taken = made_of(reader, samples_per_rank=(7,), last="drop")
    made.run(20)
    assert made.epochs == 20
    assert {row for step in taken.rows for batch in step for row in batch} == set(range(7))


@pytest.mark.parametrize(("size", "sizes"), [(8, [8]), (16, [])])
def test_a_resumed_run_with_larger_batches_drops_what_is_no_batch(
    size: int, sizes: list[int], shard: Path
) -> None:
    """12 of 23 rows are done."""

    def make(batch_size: int) -> tuple[Worker, Steps]:
        reader = make_reader([Span(str(shard), 0, 23)], DataConfig(), 1, FIELDS, 1 << 30)
        return made_of(reader, batch_size=batch_size, samples_per_rank=(23,), last="drop")

    first, _ = make(4)
    first.run(3)
    second, taken = make(size)
    second.load_state_dict(first.state_dict())
    assert not second.restarted
    second.run(1)
    assert (second.epochs, [len(batch) for step in taken.rows for batch in step]) == (1, sizes)
    second.run(1)
    assert len(taken.rows[-1][0]) == size
