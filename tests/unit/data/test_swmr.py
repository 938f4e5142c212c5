"""Files that a program goes on writing, in SWMR mode, while they are read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import find_shards, make_catalog, summarize_labels
from hvd_train.data.growing import growing, rows_of, settled
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import plain
from hvd_train.data.readers.make import make_reader
from hvd_train.data.rows import Rows
from hvd_train.data.selection import select_rows
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.tools.shard import main
from tests.unit.data.shards import row_numbers, write_foreign
from tests.unit.data.swmr import Writer

NAMES = plain(("inputs", "targets"))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with Writer(tmp_path / "a.h5") as writer:
        yield writer


def test_a_run_has_the_rows_of_its_beginning(tmp_path: Path, writer: Writer) -> None:
    writer.add(95, ahead=3)
    data = DataConfig(path=str(tmp_path / "a.h5"), reading="stream")
    first = find_shards(data)
    writer.add(20)
    second = find_shards(data)
    assert [shards.train[0].num_samples for shards in (first, second)] == [95, 115], "of two starts"
    paths = growing(first)
    assert paths == [data.path]
    settled_first = settled(first, rows_of(first, paths))
    assert settled_first.warnings == (
        f"{data.path}: a program is writing it (SWMR). The run uses the 95 rows that it had when the run "
        "began; a resumed run uses those that it has then.",
    )
    catalog = make_catalog(settled_first, data, [summarize_labels(settled_first)])
    reader = make_reader(catalog.train, data, 0, catalog.sample.fields, 0)
    numbers: list[int] = []
    while batch := reader.next_batch(30):
        numbers += row_numbers(batch)
        writer.add(100)
    assert sorted(numbers) == list(range(95))
    reader.close()


def test_growth_is_no_replacement_and_neither_is_the_end_of_it(tmp_path: Path, writer: Writer) -> None:
    """Files are opened again, now and then, with what they have then."""
    writer.add(50)
    shards = find_shards(DataConfig(path=str(tmp_path / "a.h5")))
    catalog = make_catalog(shards, DataConfig(), [summarize_labels(shards)])
    rows = Rows(catalog.train, catalog.sample.fields)
    for step in (lambda: None, lambda: writer.add(60), writer.close):
        step()
        assert row_numbers(rows.read(10, 50)) == list(range(10, 50))
        rows.close()
    write_foreign(tmp_path / "a.h5", 40)
    with pytest.raises(DataError, match="the file was replaced after the run began"):
        rows.read(0, 10)


def test_a_file_that_is_closed_while_this_process_has_it_open(tmp_path: Path, writer: Writer) -> None:
    writer.add(50)
    with ShardFile(tmp_path / "a.h5", NAMES) as file:
        writer.add(50)
        writer.close()
        with ShardFile(tmp_path / "a.h5", NAMES) as again:
            assert again.read("targets", 40, 50).tolist() == file.read("targets", 40, 50).tolist()
    assert read_info(tmp_path / "a.h5", NAMES).num_samples == 100
    assert not read_info(tmp_path / "a.h5", NAMES).growing


def test_the_rows_that_a_killed_writer_left(tmp_path: Path, writer: Writer) -> None:
    """SWMR keeps the file readable all the time: nothing has to be removed from it."""
    writer.add(50)
    writer.kill()
    with ShardFile(tmp_path / "a.h5", NAMES) as file:
        rows = {name: file.read(name, 0, file.info.num_samples) for name in NAMES.places}
    assert row_numbers(rows) == list(range(50))


def test_virtual_datasets_that_grow_with_it(tmp_path: Path, writer: Writer) -> None:
    """One of fixed rows is read; to find the rows of one that grows, HDF5 does not open the file so."""
    writer.add(50)
    endless = h5py.h5s.UNLIMITED
    for name, rows in (("fixed.h5", 40), ("grows.h5", endless)):
        layout = h5py.VirtualLayout((40, 3), "f4", maxshape=(None, 3))
        source = h5py.VirtualSource("a.h5", "inputs", (40, 3), maxshape=(None, 3))
        layout[0:rows] = source[0:rows]
        with h5py.File(tmp_path / name, "w", libver="latest") as file:
            file.create_virtual_dataset("inputs", layout)
    followed = plain(("inputs",), follow_links=True)
    with ShardFile(tmp_path / "fixed.h5", followed) as file:
        assert file.read("inputs", 0, 40)[:, 0].tolist() == list(range(40))
    with pytest.raises(UnsupportedShard) as refused:
        read_info(tmp_path / "grows.h5", followed)
    assert str(refused.value) == (
        f"{tmp_path / 'grows.h5'}: virtual dataset `inputs` grows with {tmp_path / 'a.h5'}, which a program "
        "is writing (SWMR). Expected sources that are complete: wait for that program, or name that file as "
        "the shard."
    )
    assert read_info(tmp_path / "a.h5", NAMES).num_samples == 50
    writer.close()
    assert read_info(tmp_path / "grows.h5", followed).num_samples == 50


def test_a_file_without_rows_yet(tmp_path: Path, writer: Writer) -> None:
    writer.add(0)
    with pytest.raises(DataError, match=r"a\.h5: no samples\. Expected at least 1"):
        find_shards(DataConfig(path=str(tmp_path / "a.h5")))
    writer.add(10)
    shards = find_shards(DataConfig(path=str(tmp_path / "a.h5")))
    with pytest.raises(DataError) as refused:
        settled(shards, {shards.train[0].path: 0})
    assert str(refused.value) == (
        f"{tmp_path / 'a.h5'}: no samples yet. Start the run when the program has written some."
    )


def test_after_a_training_files_have_to_be_complete(tmp_path: Path, writer: Writer) -> None:
    """What is written of each row, and compared on resuming, would depend on the moment."""
    writer.add(50)
    path = tmp_path / "a.h5"
    sample = find_shards(DataConfig(path=str(path))).sample
    with pytest.raises(UnsupportedShard) as refused:
        select_rows(str(path), sample, ("inputs", "targets"))
    assert str(refused.value).startswith(
        f"{path}: a program is writing it (SWMR). Expected a file that is complete:"
    )
    (statements,) = re.findall(r"to a new file, `new`: `(.*)`\.$", str(refused.value))
    writer.add(50)
    with h5py.File(path, "r", swmr=True) as old, h5py.File(tmp_path / "b.h5", "w") as new:
        exec(statements, {"old": old, "new": new})
    selected = select_rows(str(tmp_path / "b.h5"), sample, ("inputs", "targets"))
    assert row_numbers(Rows(selected.spans, selected.fields).read(0, 50)) == list(range(50))


def test_the_commands_of_shard_take_the_rows_that_are_there(
    tmp_path: Path, writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.add(50)
    path = str(tmp_path / "a.h5")
    assert main(["check", path]) == 0
    assert capsys.readouterr().out == f"{path}: good; a program is writing it (SWMR): its first 50 rows\n"
    assert main(["info", path]) == 0
