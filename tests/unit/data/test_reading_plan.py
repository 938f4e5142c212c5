"""Who reads what in an epoch: an order that does not depend on the ranks, and parts that go round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hvd_train.config import DataConfig
from hvd_train.data.batches import next_batch
from hvd_train.data.catalog import open_catalog
from hvd_train.data.readers.cursor import Share
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.readers.plan import ReadingPlan
from hvd_train.errors import ConfigError
from tests.unit.data.shards import row_numbers, write_foreign

SIZES = (11, 23, 37, 5, 53)
ROWS = sum(SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        write_foreign(tmp_path / f"s{number}.h5", size, sum(SIZES[:number]))
    return tmp_path


def plans(folder: Path, ranks: int, **data: Any) -> list[ReadingPlan]:
    config = DataConfig(path=str(folder), **data)
    catalog = open_catalog(config)
    return [
        ReadingPlan(catalog=catalog, data=config, seed=3, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def steps(readers: list[EpochReader], size: int) -> Iterator[list[list[int]]]:
    """The rows of every rank in each step of an epoch."""
    while readers[0].left:
        rows = next_batch(readers[0].left, size)
        batches = [reader.next_batch(rows) for reader in readers]
        assert len({reader.left for reader in readers}) == 1
        yield [row_numbers(batch) if batch is not None else [] for batch in batches]


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_the_global_order_is_the_same_for_any_number_of_ranks(reading: str, folder: Path) -> None:
    """Step j of p ranks takes the rows [j p B, (j + 1) p B) of one sequence, in the order of the ranks."""
    sequences = []
    for ranks in (1, 2, 3, 8):
        sequences.append([])
        with ExitStack() as stack:
            made = plans(folder, ranks, reading=reading, order="global", batch_size=4)
            assert made[0].sharing == ranks
            assert made[0].samples_per_part == [ROWS]
            assert sum(made[0].samples_per_rank) == ROWS
            assert made[0].shards_per_rank == [5] * ranks
            readers = [plan.reader(1 << 30) for plan in made]
            for reader in readers:
                stack.callback(reader.close)
            for epoch in (0, 1):
                for reader in readers:
                    reader.start_epoch(epoch)
                sequences[-1].append([])
                for by_rank in steps(readers, 4 * ranks):
                    sequences[-1][-1] += [row for rows in by_rank for row in rows]
                    sizes = [len(rows) for rows in by_rank]
                    if sum(sizes) in (4 * ranks, 4 * ranks + 1):
                        assert set(sizes) <= {4, 5}
                    assert 1 not in sizes
    assert all(sequence == sequences[0] for sequence in sequences)
    assert [sorted(epoch) for epoch in sequences[0]] == [list(range(ROWS))] * 2
    assert sequences[0][0] != sequences[0][1]


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_the_global_order_goes_on_with_any_number_of_ranks(reading: str, folder: Path) -> None:
    def readers(ranks: int) -> list[EpochReader]:
        made = plans(folder, ranks, reading=reading, order="global", batch_size=4)
        return [plan.reader(1 << 30) for plan in made]

    (whole,) = readers(1)
    expected = [row for (rows,) in steps([whole], 4) for row in rows]
    seen: list[int] = []
    states = [whole.state_dict() | {"position": 0}]
    whole.close()
    for ranks in (3, 2, 5, 1):
        now = readers(ranks)
        for reader in now:
            reader.load_state_dict(states[0])
            assert not reader.restarted
        for step, by_rank in enumerate(steps(now, 4 * ranks)):
            seen += [row for rows in by_rank for row in rows]
            if step == 1 and ranks > 1:
                break
        states = [reader.state_dict() for reader in now]
        for reader in now:
            reader.close()
    assert seen == expected


def test_stretches_of_a_batch() -> None:
    shares = [Share(rank, 3, 2) for rank in range(3)]
    assert [share.of(10, 22) for share in shares] == [(10, 14), (14, 18), (18, 22)]
    assert [share.of(10, 23) for share in shares] == [(10, 14), (14, 18), (18, 23)]
    assert [share.of(10, 15) for share in shares] == [(10, 12), (12, 15), (15, 15)]
    assert [share.of(10, 11) for share in shares] == [(10, 11), (11, 11), (11, 11)]
    assert [Share(rank, 3, 1).of(0, 2) for rank in range(3)] == [(0, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("reading", ["memory", "stream"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parts_go_round(ranks: int, reading: str, folder: Path) -> None:
    """In epoch e rank r reads part (r + e) mod p: after p epochs it has met all rows. To the row again from a
    state in the middle of an epoch."""
    made = plans(folder, ranks, reading=reading, redeal="epoch", batch_size=4)
    readers = [plan.reader(1 << 30) for plan in made]
    parts: list[list[set[int]]] = []
    for epoch in range(2 * ranks):
        parts.append([])
        for rank, reader in enumerate(readers):
            reader.start_epoch(epoch)
            first = row_numbers(reader.next_batch(10) or {})
            again = made[rank].reader(1 << 30)
            again.load_state_dict(reader.state_dict())
            assert not again.restarted
            rest = row_numbers(reader.next_batch(ROWS) or {})
            assert row_numbers(again.next_batch(ROWS) or {}) == rest
            again.close()
            parts[-1].append({*first, *rest})
            assert reader.num_samples == len(parts[-1][-1])
        assert set.union(*parts[-1]) == set(range(ROWS))
        assert sum(map(len, parts[-1])) == ROWS
    assert parts[1] == [*parts[0][1:], parts[0][0]]
    assert parts[ranks:] == parts[:ranks]
    for reader in readers:
        state = {**reader.state_dict(), "epoch": 0, "position": 0}
        assert reader.not_finite_since(state) == ""
        reader.close()


def test_a_global_order_has_no_parts_that_could_go_round() -> None:
    with pytest.raises(ConfigError, match=r"data\.redeal = 'epoch': .*never with data\.order = 'global'"):
        DataConfig(order="global", redeal="epoch")
