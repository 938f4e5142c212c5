"""Transformed batches: the two forms of a transform, and augmentation that depends on the row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.transformed_reader import InThread, TransformedReader
from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.deal import deal
from hvd_train.data.format import SampleSpec
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.make import make_reader
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.draws import Draws
from hvd_train.tasks.transforming import takes_training, transform_of
from tests.unit.data.shards import write_foreign


class Own(Task):
    """Without a transform of its own."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        return nn.Identity()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return batch["inputs"].mean(), len(batch["inputs"])


class Noisy(Own):
    """Adds what is drawn for a row as a further entry."""

    def transform(self, batch: Batch, training: Draws | None) -> Batch:
        if training is None:
            return batch
        assert len(training) == len(batch["inputs"])
        return {**batch, "noise": training.uniform((2,)), "seed": torch.tensor([training.seed(0)])}


def test_a_transform_with_one_argument_is_the_same_in_training() -> None:
    class One(Own):
        def transform(self, batch: Batch, scale: float = 2.0) -> Batch:
            return {"inputs": batch["inputs"] * scale}

    transform, training = transform_of(One()), Draws(0, 0, [1])
    assert not takes_training(One())
    for given in (None, training):
        assert transform({"inputs": torch.tensor([3.0])}, given)["inputs"].item() == 6


def test_a_transform_gets_what_it_declares() -> None:
    seen: list[Any] = []

    class Positional(Own):
        def transform(self, batch: Batch, training: Draws | None) -> Batch:
            seen.append(training)
            return batch

    class ByName(Own):
        def transform(self, batch: Batch, *, training: Draws | None = None) -> Batch:
            seen.append(training)
            return batch

    class Wrapping(Own):
        def transform(self, *args: Any, **kwargs: Any) -> Batch:
            return Positional().transform(*args, **kwargs)

    training = Draws(0, 0, [1])
    for task in (Positional(), ByName(), Wrapping()):
        assert takes_training(task)
        transform = transform_of(task)
        transform({})
        transform({}, training)
    assert seen == [None, training] * 3
    assert not takes_training(Own())
    batch = {"inputs": torch.zeros(1)}
    assert transform_of(Own())(batch, training) is batch


def test_a_transform_with_other_arguments_is_refused() -> None:
    class Other(Own):
        def transform(self, batch: Batch, train: bool) -> Batch:
            return batch

    class Static(Own):
        @staticmethod
        def transform() -> None:  # type: ignore[override]
            pass

    with pytest.raises(TaskError) as caught:
        transform_of(Other())
    assert str(caught.value) == (
        "Other defines transform(self, batch, train); expected transform(self, batch) or "
        "transform(self, batch, training). Give it these arguments, with these names."
    )
    with pytest.raises(TaskError, match=r"Static defines transform\(self\); expected"):
        transform_of(Static())


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """Two shards with the same name, and rows that are cut off for validation."""
    first = 0
    for folder, rows in (("a", 37), ("b", 52)):
        (tmp_path / folder).mkdir()
        write_foreign(tmp_path / folder / "x.h5", rows, first)
        first += rows
    return open_catalog(DataConfig(path=str(tmp_path / "*" / "x.h5"), validation=0.2))


def reader_of(
    catalog: Catalog, rank: int, size: int, reading: str, batch_size: int, task: Task
) -> TransformedReader:
    data = DataConfig(reading=reading)  # type: ignore[arg-type]
    part = deal(catalog.train, size)[rank]
    reader = make_reader(part, data, 4, catalog.sample.fields, 1 << 30)
    transformer = InThread(task, 4)
    return TransformedReader(reader, transformer, Numbering(catalog.shards), batch_size=batch_size)


def batches_of(reader: TransformedReader) -> Iterator[Batch]:
    """What is left of the epoch."""
    while (drawn := reader.next_batch()) is not None:
        assert drawn.batch is not None
        yield drawn.batch


def noise(readers: Sequence[TransformedReader], epochs: Sequence[int]) -> dict[tuple[int, int], list[float]]:
    """What is drawn for each row in each epoch, by epoch and row."""
    found = {}
    for reader in readers:
        for epoch in epochs:
            reader.start_epoch(epoch)
            for batch in batches_of(reader):
                for row, drawn in zip(batch["inputs"][:, 0].tolist(), batch["noise"].tolist(), strict=True):
                    assert found.setdefault((epoch, int(row)), drawn) is drawn
        reader.close()
    return found


def test_augmentation_does_not_depend_on_ranks_batches_or_reading(catalog: Catalog) -> None:
    expected = noise([reader_of(catalog, 0, 1, "memory", 8, Noisy())], [0, 1])
    assert len(expected) == len({tuple(drawn) for drawn in expected.values()}) == 2 * 72
    for size in (1, 2, 5):
        for reading in ("memory", "stream"):
            for batch_size in (3, 100):
                readers = [
                    reader_of(catalog, rank, size, reading, batch_size, Noisy()) for rank in range(size)
                ]
                assert noise(readers, [0, 1]) == expected
    assert expected[0, 40] == Draws(4, 0, [40]).uniform((2,))[0].tolist(), "by the number in the data"


@pytest.fixture(params=["memory", "stream"])
def reader(catalog: Catalog, request: pytest.FixtureRequest) -> Iterator[TransformedReader]:
    made = reader_of(catalog, 0, 1, request.param, 10, Noisy())
    yield made
    made.close()


def test_a_resumed_reader_draws_the_same(reader: TransformedReader) -> None:
    reader.start_epoch(2)
    for _ in range(3):
        reader.next_batch()
    state = reader.state_dict()
    rest = list(batches_of(reader))
    reader.start_epoch(5)
    reader.load_state_dict(state)
    again = list(batches_of(reader))
    assert len(again) == len(rest) == 5
    for first, second in zip(rest, again, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
