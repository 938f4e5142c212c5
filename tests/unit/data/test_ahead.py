"""Batches that are gathered ahead: the same ones, from another thread, and without a trace in the state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.batches import next_batch
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec
from hvd_train.data.readers.ahead import ReadsAhead
from hvd_train.data.readers.base import ArrayBatch, Reader
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.mmap import MmapReader
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError
from tests.unit.data.shards import write_foreign

FIELDS = {"inputs": FieldSpec(shape=(3,), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}
Recorded = tuple[Reader, list[tuple[int, bool]]]


@pytest.fixture
def span(tmp_path: Path) -> Span:
    return Span(str(write_foreign(tmp_path / "a.h5", 41)), 0, 41)


@pytest.fixture
def recorded(span: Span, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Recorded]:
    """A reader, and the sizes of the batches that it was asked for, each with whether in the main thread."""

    def make() -> Recorded:
        reader = MemoryReader(Rows([span], FIELDS), 0)
        asked: list[tuple[int, bool]] = []
        read = reader.next_batch

        def next_batch(size: int) -> ArrayBatch | None:
            asked.append((size, threading.current_thread() is threading.main_thread()))
            return read(size)

        monkeypatch.setattr(reader, "next_batch", next_batch)
        return reader, asked

    return make


@pytest.mark.parametrize("kind", [MemoryReader, MmapReader, StreamReader])
def test_batches_and_states_are_those_of_the_reader(kind: Any, span: Span) -> None:
    """Of 41 rows, the last of which joins the batch before it."""
    plain, ahead = kind(Rows([span], FIELDS), 3), ReadsAhead(kind(Rows([span], FIELDS), 3), 8, worthwhile_s=0)
    assert (ahead.mode, ahead.num_samples) == (plain.mode, 41)
    for epoch in (0, 1, 4):
        for reader in (plain, ahead):
            reader.start_epoch(epoch)
        while plain.left:
            assert ahead.left == plain.left
            size = next_batch(plain.left, 8)
            batch, expected = ahead.next_batch(size), plain.next_batch(size)
            np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
            assert ahead.state_dict() == plain.state_dict()
        assert (ahead.left, ahead.next_batch(8)) == (0, None)
    plain.close()
    ahead.close()
    ahead.close()


def test_all_but_the_first_batch_come_from_the_other_thread(recorded: Callable[[], Recorded]) -> None:
    reader, asked = recorded()
    ahead = ReadsAhead(reader, 8, worthwhile_s=0)
    for _ in range(5):
        ahead.next_batch(next_batch(ahead.left, 8))
    assert ahead.left == 0
    ahead.start_epoch(1)  # whose first batch is gathered at once
    ahead.next_batch(8)
    ahead.close()
    assert asked[:6] == [(8, True), (8, False), (8, False), (8, False), (9, False), (8, False)]


def test_quick_batches_stay_in_the_training_thread(recorded: Callable[[], Recorded]) -> None:
    reader, asked = recorded()
    ahead = ReadsAhead(reader, 8, worthwhile_s=1e9)
    for _ in range(5):
        ahead.next_batch(next_batch(ahead.left, 8))
    ahead.close()
    assert asked == [(8, True), (8, True), (8, True), (8, True), (9, True)]


def test_another_size_than_expected_leaves_no_row_out(recorded: Callable[[], Recorded]) -> None:
    reader, asked = recorded()
    expected = MemoryReader(reader._rows, 0)  # type: ignore[attr-defined]
    ahead = ReadsAhead(reader, 8, worthwhile_s=0)
    for size in (8, 3, 8, 20, 2):
        batch, other = ahead.next_batch(size), expected.next_batch(size)
        assert batch is not None
        assert other is not None
        np.testing.assert_array_equal(batch["inputs"], other["inputs"])
        assert ahead.state_dict() == expected.state_dict()
    ahead.close()
    assert (8, False) in asked
    assert (3, True) in asked


def test_a_state_is_loaded_while_a_batch_is_gathered(recorded: Callable[[], Recorded]) -> None:
    reader, _ = recorded()
    ahead = ReadsAhead(reader, 8, worthwhile_s=0)
    ahead.start_epoch(2)
    first = ahead.next_batch(8)
    state = ahead.state_dict()
    second = ahead.next_batch(8)
    ahead.load_state_dict(state)
    assert not ahead.restarted
    again = ahead.next_batch(8)
    assert first is not None
    assert second is not None
    assert again is not None
    np.testing.assert_array_equal(again["inputs"], second["inputs"])
    ahead.load_state_dict({**state, "fingerprint": "of other data"})
    assert (ahead.restarted, ahead.left, ahead.state_dict()["epoch"]) == (True, 41, 2)
    ahead.close()


def test_an_error_comes_with_the_batch_that_it_belongs_to(
    recorded: Callable[[], Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = recorded()
    ahead = ReadsAhead(reader, 8, worthwhile_s=0)
    read, count = reader.next_batch, iter(range(9))

    def fail(size: int) -> ArrayBatch | None:
        if next(count) == 1:
            raise DataError("a.h5: damaged")
        return read(size)

    monkeypatch.setattr(reader, "next_batch", fail)
    assert ahead.next_batch(8) is not None
    with pytest.raises(DataError, match=r"a\.h5: damaged"):
        ahead.next_batch(8)
    ahead.start_epoch(1)
    assert ahead.next_batch(8) is not None
    ahead.close()


def test_a_value_that_is_not_finite_is_not_that_of_a_batch_gathered_ahead(span: Span) -> None:
    order = MemoryReader(Rows([span], FIELDS), 0)
    order.next_batch(8)
    coming = order.next_batch(8)
    assert coming is not None
    with h5py.File(span.shard, "r+") as file:
        file["inputs"][int(coming["inputs"][3, 0]), 1] = np.nan
    ahead = ReadsAhead(MemoryReader(Rows([span], FIELDS), 0), 8, worthwhile_s=0)
    began = ahead.state_dict()
    ahead.next_batch(8)
    assert ahead.not_finite_since(began) == ""
    ahead.next_batch(8)
    assert ahead.not_finite_since(began).endswith(f"`inputs` holds nan in row {int(coming['inputs'][3, 0])}")
    ahead.close()
