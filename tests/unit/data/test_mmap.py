"""Rows out of mapped files: the same as those in memory, and every file that cannot be mapped is refused."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data import shard_file
from hvd_train.data.catalog import open_catalog
from hvd_train.data.deal import Span
from hvd_train.data.format import Array
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.mapped import MappedShard
from hvd_train.data.places import places_of
from hvd_train.data.readers import make as making
from hvd_train.data.readers.base import Reader
from hvd_train.data.readers.make import make_reader
from hvd_train.data.readers.memory import MemoryReader
from hvd_train.data.readers.mmap import MmapReader
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.verify import Verifier
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.launching import run
from tests.unit.data.recipes import hdf5_tool
from tests.unit.data.shards import write_foreign


def rows_of(*spans: Span, **data: Any) -> Rows:
    info = read_info(spans[0].shard, places_of(DataConfig(**data)))
    return Rows(spans, info.fields)


def batches(reader: Reader, size: int = 7) -> list[dict[str, Array]]:
    return list(iter(lambda: reader.next_batch(size), None))


def same(one: Reader, other: Reader) -> None:
    """The epochs of both, batch by batch."""
    for epoch in (0, 2):
        for reader in (one, other):
            reader.start_epoch(epoch)
        for batch, expected in zip(batches(one), batches(other), strict=True):
            assert batch.keys() == expected.keys()
            for name, array in batch.items():
                assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
                np.testing.assert_array_equal(array, expected[name])
                assert array.flags.c_contiguous
                assert array.flags.aligned
                assert array.flags.writeable


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """41 rows at odd addresses of the file, in either byte order."""
    rng = np.random.default_rng(0)
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["seven bytes"] = np.zeros(7, np.uint8)
        file["inputs"] = rng.normal(size=(41, 3, 4)).astype("<f4")
        file["big"] = rng.normal(size=(41, 5)).astype(">f8")
        file["yes"] = rng.random((41, 2)) < 0.5
        file["half"] = rng.normal(size=(41, 1)).astype("<f2")
        file["targets"] = rng.integers(0, 9, 41).astype(">i2")
        file.create_dataset(
            "kind", data=rng.integers(0, 3, 41), dtype=h5py.enum_dtype({"a": 0, "b": 1, "c": 2})
        )
        assert file["inputs"].id.get_offset() % 4 != 0
    return path


FIELDS = {
    "x": "big",
    "yes": "yes",
    "half": "half",
    "kind": "kind",
    "corner": "inputs[1:,0]",
    "row": "inputs[-1]",
}


def test_batches_are_those_of_rows_in_memory(odd: Path) -> None:
    spans = [Span(str(odd), 3, 20), Span(str(odd), 25, 40)]
    rows = rows_of(*spans, fields=FIELDS)
    one, other = MmapReader(rows, 5), MemoryReader(Rows(spans, rows.fields), 5)
    assert set(rows.fields) == {*FIELDS, "inputs", "targets"}
    same(one, other)
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="the reader is closed"):
        one.next_batch(1)


def test_either_of_the_two_goes_on_with_the_state_of_the_other(tmp_path: Path) -> None:
    spans = [Span(str(write_foreign(tmp_path / f"{i}.h5", 20, first=20 * i)), i, 18) for i in range(3)]
    rows = rows_of(*spans)
    for first, second in ((MmapReader, MemoryReader), (MemoryReader, MmapReader)):
        one, other = first(Rows(spans, rows.fields), 1), second(Rows(spans, rows.fields), 1)
        one.start_epoch(3)
        one.next_batch(11)
        other.load_state_dict(one.state_dict())
        assert not other.restarted
        for batch, expected in zip(batches(one), batches(other), strict=True):
            np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
        one.close()
        other.close()


def damaged(path: Path, name: str, row: int) -> None:
    """One bit of a row is another one."""
    with h5py.File(path, locking=False) as file:
        at = file[name].id.get_offset() + row * file[name].dtype.itemsize * int(np.prod(file[name].shape[1:]))
    with path.open("r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)[0]
        raw.seek(at)
        raw.write(bytes([byte ^ 4]))


def test_a_block_is_verified_once_when_a_row_of_it_is_first_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "CHECKSUM_BYTES", 4 * 20)
    inputs = np.arange(120, dtype=np.float32).reshape(40, 3)
    write_part(tmp_path / "d", Arrays(inputs, np.arange(40)))
    verified: list[tuple[str, int]] = []
    is_good = Verifier.is_good

    def recording(verifier: Verifier, block: int, rows: Array) -> bool:
        verified.append((verifier._name, block))
        return is_good(verifier, block, rows)

    monkeypatch.setattr(Verifier, "is_good", recording)
    catalog = open_catalog(DataConfig(path=str(tmp_path / "d")))
    (span,) = catalog.train
    rows = Rows([span], catalog.sample.fields)
    shard = MappedShard(rows.shard(span.shard).file, list(rows.fields), [(4, 12), (36, 40)])
    assert verified == []
    np.testing.assert_array_equal(shard.take(np.array([9, 4, 8]))["targets"], [9, 4, 8])
    assert verified == [("inputs", 1), ("inputs", 2), ("targets", 1), ("targets", 2)]
    shard.take(np.array([10, 39]))
    assert verified[4:] == [("inputs", 9), ("targets", 9)]
    shard.close()
    shard = MappedShard(rows.shard(span.shard).file, list(rows.fields), [(8, 40)])
    shard.take(np.array([8]))
    damaged(Path(span.shard), "inputs", 9)  # mapped memory is what the file is now
    damaged(Path(span.shard), "inputs", 21)
    shard.take(np.array([8]))
    with pytest.raises(DataError) as caught:
        shard.take(np.array([22]))
    assert str(caught.value) == (
        f"{span.shard}: dataset `inputs`, rows 20 to 23: not what was written. The file is damaged: copy or "
        "write it again."
    )
    shard.close()
    rows.close()


def test_a_file_that_is_cut_short_is_an_error(odd: Path) -> None:
    rows = rows_of(Span(str(odd), 0, 41))
    reader = MmapReader(rows, 0)
    reader.open()
    reader.next_batch(5)
    size = odd.stat().st_size
    with h5py.File(odd) as file:
        stop = file["targets"].id.get_offset() + 2 * 41
    os.truncate(odd, stop - 1)
    with pytest.raises(DataError) as caught:
        reader.next_batch(5)
    assert str(caught.value) == (
        f"{odd}: {stop - 1} bytes, but its rows reach up to byte {stop}: the file was cut short. Restore it, "
        "and start the run again."
    )
    os.truncate(odd, size)
    assert reader.next_batch(5) is not None
    reader.close()


def test_cut_short_while_rows_are_copied_the_process_ends_with_the_name_of_the_file(tmp_path: Path) -> None:
    """The check before is switched off, as if the file had been cut between it and the copy."""
    path = write_foreign(tmp_path / "large.h5", 100_000)
    script = (
        "import os, sys; from hvd_train.config import DataConfig; from hvd_train.data.deal import Span\n"
        "from hvd_train.data.hdf5.file import read_info; from hvd_train.data.places import plain\n"
        "from hvd_train.data.mapped import MappedShard; from hvd_train.data.readers.mmap import MmapReader\n"
        "from hvd_train.data.rows import Rows\n"
        "info = read_info(sys.argv[1], plain(('inputs', 'targets')))\n"
        "reader = MmapReader(Rows([Span(sys.argv[1], 0, 100_000)], info.fields), 0); reader.open()\n"
        "MappedShard._require_whole = lambda shard: None\n"
        "os.truncate(sys.argv[1], 4096); reader.next_batch(64); print('not reached')\n"
    )
    job = run([sys.executable, "-c", script, str(path)], deadline_s=60)
    assert job.returncode == -signal.SIGBUS
    assert "not reached" not in job.stdout
    assert re.search(
        rf'File "<{re.escape(str(path))}>", line \d+ in this file is mapped into memory: it was cut short, '
        "or its file system failed",
        job.stderr,
    )


def test_a_file_that_is_replaced_or_deleted_stays_mapped(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 20)
    reader = MmapReader(rows_of(Span(str(path), 0, 20)), 0)
    reader.open()
    write_foreign(tmp_path / "b.h5", 20, first=500).replace(path)
    assert sorted(int(row) for batch in batches(reader) for row in batch["inputs"][:, 0]) == list(range(20))
    path.unlink()
    reader.start_epoch(1)
    assert len(batches(reader)) == 3
    reader.close()


def chunked(file: h5py.File, values: Array) -> None:
    file.create_dataset("inputs", data=values, chunks=(5, 3))


def compressed(file: h5py.File, values: Array) -> None:
    file.create_dataset("inputs", data=values, chunks=(5, 3), compression="gzip")


def compact(file: h5py.File, values: Array) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(file.id, b"inputs", h5py.h5t.NATIVE_FLOAT, space, plist).write(space, space, values)


def unwritten(file: h5py.File, values: Array) -> None:
    file.create_dataset("inputs", values.shape, values.dtype)


def packed(file: h5py.File, values: Array) -> None:
    file["inputs"] = values.astype("i2")
    file["inputs"].attrs["scale_factor"] = 0.5


def of_another_type(file: h5py.File, values: Array) -> None:
    file.create_dataset("inputs", data=values.astype(np.longdouble))


def table(file: h5py.File, values: Array) -> None:
    columns = np.zeros(len(values), [("x", "f4"), ("y", "f4")])
    columns["x"], columns["y"] = values[:, 0], values[:, 1]
    file["inputs"] = columns


REPACK = (
    "Write it as one piece, `h5repack -f NONE -l CONTI {path} repacked.h5`, or choose data.reading = "
    "'stream'."
)
OTHERWISE = "Read it with data.reading = 'stream', or 'memory'."


@pytest.mark.parametrize(
    ("write", "data", "reason", "remedy"),
    [
        (chunked, {}, "is stored in chunks", REPACK),
        (compressed, {}, "is compressed", REPACK),
        (compact, {}, "is not stored as one piece of the file", REPACK),
        (unwritten, {}, "was never written", OTHERWISE),
        (packed, {}, "holds values that stand for others", OTHERWISE),
        (of_another_type, {}, "holds values that are converted as they are read", OTHERWISE),
        (table, {"inputs": "inputs[x,y]"}, "is a table, of which columns are read", OTHERWISE),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_auto_does_not_choose_it(
    write: Callable[[h5py.File, Array], None],
    data: dict[str, Any],
    reason: str,
    remedy: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        write(file, np.arange(60, dtype=np.float32).reshape(20, 3))
        file["targets"] = np.arange(20)
    span = Span(str(path), 0, 20)
    fields = rows_of(span, **data).fields
    name = data.get("inputs", "inputs")
    with pytest.raises(DataError) as caught:
        make_reader([span], DataConfig(reading="mmap", **data), 0, fields, 0)
    message = str(caught.value)
    expected = remedy.format(path=path)
    assert message == f"{path}: with data.reading = 'mmap', dataset `{name}` {reason}. {expected}"
    reader = make_reader([span], DataConfig(**data), 0, fields, 600)
    assert (reader.mode, reader.why) == (
        "stream",
        "the rows do not fit into half of the free memory, and are not mapped, since dataset "
        f"`{name}` {reason}",
    )
    expected_batches = batches(MemoryReader(Rows([span], fields), 0), 20)
    reader.close()
    if remedy is not REPACK:
        return
    program, *arguments = message.split("`")[-2].split()
    job = run([hdf5_tool(program), *arguments], cwd=tmp_path, deadline_s=60)
    assert job.returncode == 0, job.output
    mapped = MmapReader(Rows([Span(str(tmp_path / "repacked.h5"), 0, 20)], fields), 0)
    (batch,) = batches(mapped, 20)
    mapped.close()
    order = np.argsort(batch["targets"]), np.argsort(expected_batches[0]["targets"])
    np.testing.assert_array_equal(batch["inputs"][order[0]], expected_batches[0]["inputs"][order[1]])


def test_samples_along_another_axis_and_classes_by_value_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["inputs"] = np.zeros((3, 20), np.float32)
        file["targets"] = np.arange(20) % 2 * 5
    span = Span(str(path), 0, 20)
    for data, reason in (
        ({"samples_axis": -1}, "`inputs` has its samples along another axis than the first"),
        (
            {"inputs": "targets", "targets": "kind", "fields": {"kind": "targets"}, "classes": ("0", "5")},
            "`kind` ",
        ),
    ):
        config = DataConfig(reading="mmap", **data)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=re.escape(f"'mmap', dataset {reason}")):
            make_reader([span], config, 0, read_info(path, places_of(config)).fields, 0)


@pytest.mark.parametrize(
    ("kind", "width", "budget", "why"),
    [
        ("xfs", 3, 300, "the rows do not fit into half of the free memory, and the files can be mapped"),
        ("xfs", 3, 260, "they exceed the page cache, and rows of 20 bytes are slow to read one by one"),
        ("ext4", 16384, 100, "the rows do not fit into half of the free memory, and the files can be mapped"),
        ("lustre", 16384, 100, "a file is on lustre, which is not known to be local"),
        ("nfs4", 3, 300, "a file is on nfs4, which is not known to be local"),
    ],
)
def test_auto_maps_where_that_is_fast(
    kind: str, width: int, budget: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["inputs"] = np.zeros((20, width), np.float32)
        file["targets"] = np.arange(20)
    seen: list[Path] = []

    def file_system(path: Path) -> str:
        seen.append(path)
        return kind

    monkeypatch.setattr(making, "file_system", file_system)
    span = Span(str(path), 0, 20)
    reader = make_reader([span], DataConfig(), 0, rows_of(span).fields, budget)
    assert reader.mode == ("mmap" if why.endswith("can be mapped") else "stream")
    assert reader.why.endswith(why)
    assert set(seen) <= {path.resolve()}
    reader.close()


def test_auto_does_not_keep_very_many_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_MOST_FILES", 2)
    spans = [Span(str(write_foreign(tmp_path / f"{i}.h5", 20)), 0, 20) for i in range(3)]
    fields = rows_of(*spans).fields
    for some, mode in ((spans[:2], "mmap"), (spans, "stream")):
        reader = make_reader(some, DataConfig(), 0, fields, 1000)
        assert reader.mode == mode
        reader.close()
    assert reader.why.endswith("since there are 3 files")


def test_a_limit_of_the_system_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_foreign(tmp_path / "a.h5", 20)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(DataError) as caught:
        MmapReader(rows_of(Span(str(path), 0, 20)), 0).open()
    assert str(caught.value) == (
        f"{path}: the file cannot be mapped into memory: Too many open files. data.reading = "
        "'mmap' keeps every file of a rank open (`ulimit -n`) and in its address space "
        "(`ulimit -v`): raise that limit, or choose data.reading = 'stream'."
    )


def test_a_rank_without_rows(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 20)
    fields: Any = rows_of(Span(str(path), 0, 20)).fields
    parts: Sequence[Sequence[Span]] = ([], [Span(str(path), 4, 4)])
    for part in parts:
        reader = MmapReader(Rows(part, fields), 0)
        assert (reader.num_samples, reader.left, reader.next_batch(3)) == (0, 0, None)
        reader.close()
