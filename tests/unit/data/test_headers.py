"""Headers that several ranks have read, put together."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Shards, find_shards, join_shards, list_files, whole
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.headers import HeadersRead, read_headers
from hvd_train.data.readers.make import make_reader
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.unit.data.shards import write_foreign


def by_ranks(
    data: DataConfig, size: int, hosts: Sequence[int] | None = None
) -> tuple[Shards, list[HeadersRead]]:
    """What `size` ranks find together; `hosts` has the ranks of the first host."""
    files = list_files(data)
    every, ranks = files.every, range(size)
    read = [read_headers(every, files.places, rank, ranks, hosts or ranks) for rank in ranks]
    return join_shards(files, data, pickle.loads(pickle.dumps(read))), read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    for i in range(7):
        write_foreign(tmp_path / "d" / f"{i}.h5", 10 + i, 100 * i)
    write_foreign(tmp_path / "d" / "7.h5", 0)
    return tmp_path / "d"


@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_any_number_of_ranks_finds_what_one_finds(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(path=str(folder))
    opened: list[str] = []
    init = ShardFile.__init__

    def counting(self: ShardFile, path: str, *args: object, **options: object) -> None:
        opened.append(Path(path).name)
        init(self, path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardFile, "__init__", counting)
    found, read = by_ranks(data, size)
    assert sorted(opened) == [f"{i}.h5" for i in range(8)], "each file once"
    assert found == find_shards(data)
    assert [info.path for info in found.train] == [str(folder / f"{i}.h5") for i in range(7)]
    assert found.warnings == (f"{folder / '7.h5'}: no samples: skipped (1 of 8 shards).",)
    assert [sorted(part.shards) for part in read] == [list(range(rank, 8, size)) for rank in range(size)]


def test_the_first_file_that_is_wrong_is_named_whoever_reads_it(folder: Path) -> None:
    for i in (5, 2, 6):
        (folder / f"{i}.h5").write_bytes(b"no HDF5")
    for size in (1, 2, 3, 7):
        with pytest.raises(DataError, match=r"2\.h5: "):
            by_ranks(DataConfig(path=str(folder)), size)


def test_a_file_of_two_names_is_known_whichever_ranks_read_it(folder: Path) -> None:
    """Ranks 1 and 3 are on the first host: they alone compare the files."""
    (folder / "4b.h5").hardlink_to(folder / "4.h5")
    for size in (1, 2, 5):
        with pytest.raises(DataError, match=r"4b\.h5: the same file as .*4\.h5, under another name"):
            by_ranks(DataConfig(path=str(folder)), size)
    with pytest.raises(DataError, match=r"4b\.h5: the same file as"):
        by_ranks(DataConfig(path=str(folder)), 5, [1, 3])


def test_equal_rows_are_known_by_their_checksums(tmp_path: Path) -> None:
    write_part(tmp_path / "d", Arrays(np.arange(60.0).reshape(20, 3), np.arange(20) % 3), shards=2)
    shutil.copy(tmp_path / "d" / "train-00000-of-00002.h5", tmp_path / "copy.h5")
    for size in (1, 3):
        with pytest.raises(DataError, match="the same rows as in"):
            by_ranks(DataConfig(path=str(tmp_path / "**" / "*.h5")), size)
        assert len(by_ranks(DataConfig(path=str(tmp_path / "d")), size)[0].train) == 2


def test_groups_of_a_file_are_shards_in_their_order(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5", "c.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            for group in ("x", "y"):
                file[f"{group}/inputs"], file[f"{group}/targets"] = np.zeros((4, 2)), np.arange(4)
    data = DataConfig(path=str(tmp_path), inputs="*/inputs", targets="*/targets")
    found, _ = by_ranks(data, 2)
    names = [f"{name}.h5:{group}" for name in "abc" for group in "xy"]
    assert [info.path for info in found.train] == [str(tmp_path / name) for name in names]
    assert found == find_shards(data)


def test_equal_parts_of_headers_are_sent_once(tmp_path: Path) -> None:
    for i in range(50):
        write_foreign(tmp_path / f"{i:03}.h5", 10, 10 * i)
    files = list_files(DataConfig(path=str(tmp_path)))
    one = read_headers(files.every[:1], files.places)
    every = read_headers(files.every, files.places)
    assert len(pickle.dumps(every)) < len(pickle.dumps(one)) + 49 * 120
    assert len({id(header.info.layouts) for of_file in every.shards.values() for header in of_file}) == 1


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_known_headers_fit_the_files_of_this_program(tmp_path: Path, reading: str) -> None:
    write_part(tmp_path, Arrays(np.arange(60).reshape(20, 3), np.arange(20) % 3, 0.5), shards=2)
    data = DataConfig(path=str(tmp_path), reading=reading)  # type: ignore[arg-type]
    shards, _ = by_ranks(data, 2)
    reader = make_reader(whole(shards.train), data, 0, shards.sample.fields, 1 << 30, None, shards.train)
    batch = reader.next_batch(50)
    reader.close()
    assert batch is not None
    assert len(batch["inputs"]) == 20


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_a_file_that_is_another_one_when_its_rows_are_read(folder: Path, reading: str) -> None:
    data = DataConfig(path=str(folder), reading=reading)  # type: ignore[arg-type]
    shards = find_shards(data)
    write_foreign(folder / "3.h5", 12)
    spans = whole(shards.train)

    def read() -> None:
        reader = make_reader(spans, data, 0, shards.sample.fields, 1 << 30, None, shards.train)
        try:
            reader.next_batch(1000)
        finally:
            reader.close()

    with pytest.raises(DataError, match=r"3\.h5: the file was replaced after the run began, or this host"):
        read()
