"""Datasets without an index: passes over all samples, and those that a rank reads held in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.cli import main
from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.deal import Span
from hvd_train.data.labels import labels_of
from hvd_train.data.python import registry
from hvd_train.data.python.facts import reading_lines
from hvd_train.data.python.iterated import Iterated
from hvd_train.data.readers.plan import ReadingPlan
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError
from tests.unit.data.python_datasets import limited, write_module
from tests.unit.data.shards import row_numbers

SAMPLE_BYTES = 3 * 4 + 8


def passes() -> list[Any]:
    """Over the datasets of the module that was loaded last."""
    found: list[Any] = sys.modules["hvd_train_dataset_mine"].PASSES
    return found


def held(name: str) -> int:
    """How many samples are in memory."""
    made = registry.made_of(name)
    assert isinstance(made, Iterated)
    return sum(len(part.numbers) for part in made._held)


@pytest.mark.parametrize("reading", ["memory", "stream", "auto"])
@pytest.mark.parametrize("dataset", ["Streamed", "generated"])
def test_ranks_share_the_rows(dataset: str, reading: Any, tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:{dataset}"
    data = DataConfig(path=name, batch_size=8, reading=reading)
    orders = []
    for _ in range(2):
        catalog = open_catalog(data)
        used: list[int] = []
        for rank in range(3):
            plan = ReadingPlan(catalog=catalog, data=data, seed=3, rank=rank, world_size=3)
            reader = plan.reader(1 << 30)
            reader.start_epoch(1)
            while (batch := reader.next_batch(8)) is not None:
                used += row_numbers(batch)
            reader.close()
        assert sorted(used) == list(range(60))
        orders.append(used)
    assert orders[0] == orders[1]


@pytest.mark.parametrize("dataset", ["Streamed", "generated"])
def test_one_pass_counts_and_one_keeps_what_a_rank_reads(dataset: str, tmp_path: Path) -> None:
    """What the validation and the survey read is in the same pass as what is trained on."""
    name = f"{write_module(tmp_path)}:{dataset}"
    catalog = open_catalog(DataConfig(path=name, validation=0.1))
    assert len(passes()) == 1
    assert catalog.labels.count == 60
    assert catalog.sample.num_classes == 7
    assert reading_lines(catalog.shards, "targets") == []
    mine = catalog.parts(3, 8)[1]
    registry.hold((*mine, *catalog.validation))
    assert len(passes()) == 2
    assert held(name) == 18 + 6
    for spans in (mine, catalog.validation, mine):
        rows = Rows(spans, catalog.sample.fields)
        expected = [row for span in spans for row in range(span.start, span.stop)]
        assert row_numbers(rows.read(0, len(rows))) == expected
    assert len(passes()) == 2


def test_what_was_not_foreseen_is_one_more_pass(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Streamed"
    catalog = open_catalog(DataConfig(path=name))
    registry.hold([Span(name, 0, 20)])
    rows = Rows([Span(name, 10, 30), Span(name, 50, 60)], catalog.sample.fields)
    assert row_numbers(rows.read(2, 4)) == [12, 13]
    assert len(passes()) == 2
    assert row_numbers(rows.read(5, 25)) == [*range(15, 30), *range(50, 55)]
    assert row_numbers(rows.read(25, 30)) == [*range(55, 60)]
    assert (len(passes()), held(name)) == (3, 40)


def test_labels_are_those_of_the_samples(tmp_path: Path) -> None:
    name = f"{write_module(tmp_path)}:Streamed"
    assert open_catalog(DataConfig(path=name)).labels == labels_of(np.arange(60) % 7, "targets", name)


def test_texts_are_read_for_their_classes(tmp_path: Path) -> None:
    text = "def animals():\n    return iter([(inputs_of(i), 'cat dog'.split()[i % 2]) for i in range(20)])"
    name = f"{write_module(tmp_path, text)}:animals"
    catalog = open_catalog(DataConfig(path=name, classes=("cat", "dog")))
    assert catalog.sample.class_names == ("cat", "dog")
    assert Rows(catalog.train, catalog.sample.fields).read(4, 7)["targets"].tolist() == [0, 1, 0]


def test_rows_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held before makes room for others; a part that is too large is refused with what does it."""
    limited(monkeypatch, 30 * SAMPLE_BYTES, ranks=2)
    name = f"{write_module(tmp_path)}:Streamed"
    catalog = open_catalog(DataConfig(path=name))
    registry.hold([Span(name, 0, 20)])
    registry.hold([Span(name, 15, 40)])
    assert held(name) == 25
    with pytest.raises(DataError) as error:
        registry.hold(catalog.train)
    assert str(error.value) == (
        f"{name}: this rank reads 60 samples, 1,200 bytes; it can hold 600, and an iterable has no index to "
        f"read them by. Write shards of it, `hvd_train shard write --from {name} --out FOLDER`, or give it "
        "`__getitem__` and `__len__`."
    )
    folder = str(tmp_path / "shards")
    assert main(["shard", "write", "--from", name, "--out", folder]) == 0
    written = open_catalog(DataConfig(path=folder))
    assert row_numbers(Rows(written.train, written.sample.fields).read(0, 60)) == list(range(60))


def test_an_iterable_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 500 * SAMPLE_BYTES, ranks=3)
    text = "def endless():\n    while True:\n        yield inputs_of(1), 1"
    name = f"{write_module(tmp_path, text)}:endless"
    with pytest.raises(DataError) as error:
        open_catalog(DataConfig(path=name))
    assert str(error.value) == (
        f"{name}: no end after 1,500 samples of 20 bytes; the ranks can hold 30,000 bytes. Write shards of "
        f"it, `hvd_train shard write --from {name} --out FOLDER`, or give it `__getitem__` and `__len__`."
    )


OTHERS = {
    "another target": ("0, 1, 2, 3, 4, 5", "0, 1, 2, 3, 0, 5", "another target in sample 4"),
    "fewer": ("0, 1, 2, 3, 4, 5", "0, 1, 2", "3 samples in place of 6"),
    "more": ("0, 1, 2", "0, 1, 2, 3, 4, 5", "more than 3 samples in place of 3"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_pass_that_gives_other_samples(kind: str, tmp_path: Path) -> None:
    first, second, seen = OTHERS[kind]
    text = f"""
    def changing():
        PASSES.append(1)
        for i, target in enumerate([{first}] if len(PASSES) == 1 else [{second}]):
            yield inputs_of(i), target
    """
    name = f"{write_module(tmp_path, text)}:changing"
    catalog = open_catalog(DataConfig(path=name))
    with pytest.raises(DataError) as error:
        registry.hold(catalog.train)
    assert str(error.value) == (
        f"{name}: a further pass gave {seen}. Expected the same samples in the same order in every pass: "
        f"seed what is random, or write them once: `hvd_train shard write --from {name} --out FOLDER`."
    )


def test_inputs_may_be_augmented_at_random(tmp_path: Path) -> None:
    text = """
    def noisy():
        PASSES.append(1)
        for i in range(6):
            yield inputs_of(i) + len(PASSES), i % 7
    """
    name = f"{write_module(tmp_path, text)}:noisy"
    catalog = open_catalog(DataConfig(path=name))
    assert Rows(catalog.train, catalog.sample.fields).read(0, 6)["inputs"][:, 0].tolist() == [
        2,
        3,
        4,
        5,
        6,
        7,
    ]


FAILING = {
    "no samples": ("if False:\n        yield 1", "0 samples. Expected at least 1."),
    "one that fails": (
        "yield inputs_of(0), 0\n    raise OSError('gone')",
        "no sample 1: OSError: gone ({path}, line {line}). Expected an iterable that gives every sample: "
        "correct it.",
    ),
    "another shape": (
        "yield inputs_of(0), 0\n    yield inputs_of(0)[:2], 0",
        "`inputs` of sample 1 is float32 [2]. Expected float32 [3], as in sample 0: convert, pad or cut it.",
    ),
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("on_damage", ["error", "skip"])
def test_samples_that_cannot_be_read(on_damage: Any, kind: str, tmp_path: Path) -> None:
    body, expected = FAILING[kind]
    path = write_module(tmp_path, f"def failing():\n    {body}")
    name, line = f"{path}:failing", len(Path(path).read_text().splitlines())
    with pytest.raises(DataError) as error:
        open_catalog(DataConfig(path=name, on_damage=on_damage))
    assert str(error.value) == f"{name}: " + expected.format(path=path, line=line)
