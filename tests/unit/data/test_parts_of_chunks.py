"""Where a part of each row is read, or rows along another axis, memory and time do not depend on the chunks.

Relatives of chunks of columns, and of large compressed chunks that are read in order.
"""

from __future__ import annotations

import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.sources.hdf5 import Hdf5Source
from hvd_train.errors import DataError
from tests.unit.data.chunked import MIB, all_rows, catalog_of
from tests.unit.data.counting import CountingFilter
from tests.unit.data.recipes import hdf5_tool


@pytest.fixture(scope="module")
def counting() -> Iterator[CountingFilter]:
    found = CountingFilter()
    yield found
    found.close()


@pytest.fixture(scope="module")
def one_chunk(tmp_path_factory: pytest.TempPathFactory, counting: CountingFilter) -> Path:
    """80 MB in one chunk, which is more than a chunk cache or `HELD_BYTES` holds: `inputs` [20000, 1024],
    `table` [5000000] of 16 bytes, and `values` [20000000] with `offsets`."""
    path = tmp_path_factory.mktemp("one_chunk") / "a.h5"
    table = np.zeros(5_000_000, [("x", "f4"), ("y", "f4"), ("other", "f8")])
    table["x"] = np.arange(len(table))
    inputs = np.zeros((20_000, 1024), np.float32)
    inputs[:, 5] = np.arange(len(inputs))
    with h5py.File(path, "w") as file:
        counting.create(file, "inputs", inputs, inputs.shape)
        counting.create(file, "table", table, table.shape)
        counting.create(file, "values", np.arange(20_000_000, dtype=np.float32), (20_000_000,))
        file["offsets"] = np.arange(0, 20_000_001, 1000)
        file["targets"] = np.arange(20_000) % 3
        file["of_columns"] = np.zeros((1, 1024), np.int64)
        file["kinds"] = np.zeros(5_000_000, np.int8)
    return path


def in_order(path: Path, step: int, **data: Any) -> tuple[Rows, Iterator[Any]]:
    catalog = catalog_of(path, **data)
    rows = Rows(catalog.train, catalog.sample.fields)
    rows.require_in_order()
    pieces = (rows.read(start, min(start + step, len(rows))) for start in range(0, len(rows), step))
    return rows, (piece[catalog.sample.inputs] for piece in pieces)


def test_a_part_of_each_row_decodes_a_large_chunk_once(one_chunk: Path, counting: CountingFilter) -> None:
    rows, pieces = in_order(one_chunk, 64, inputs="inputs[4:8]")
    before, seen = counting.decoded, 0
    for piece in pieces:
        np.testing.assert_array_equal(piece[:, 1], np.arange(seen, seen + len(piece)))
        seen += len(piece)
    assert (seen, counting.decoded - before) == (20_000, 1)
    rows.close()


def test_columns_of_a_table_decode_a_large_chunk_once(one_chunk: Path, counting: CountingFilter) -> None:
    rows, pieces = in_order(one_chunk, 250_000, inputs="table[x]", targets="kinds")
    before, seen = counting.decoded, 0
    for piece in pieces:
        np.testing.assert_array_equal(piece, np.arange(seen, seen + len(piece)))
        seen += len(piece)
    assert (seen, counting.decoded - before) == (5_000_000, 1)
    rows.close()


def test_samples_along_the_last_axis_decode_a_large_chunk_twice(
    one_chunk: Path, counting: CountingFilter
) -> None:
    """The samples that are held are 64 MiB, of 80 MB."""
    rows, pieces = in_order(one_chunk, 32, inputs="inputs", targets="of_columns", samples_axis=-1)
    before, seen = counting.decoded, 0
    for piece in pieces:
        numbers = np.where(np.arange(seen, seen + len(piece))[:, np.newaxis] == 5, np.arange(20_000), 0)
        np.testing.assert_array_equal(piece, numbers)
        seen += len(piece)
    assert (seen, counting.decoded - before) == (1024, 2)
    rows.close()


def test_packed_rows_in_a_large_chunk_are_not_drawn_at_random(one_chunk: Path) -> None:
    catalog = catalog_of(one_chunk, inputs="packed(values, offsets)", max_length=1000)
    rows = Rows(catalog.train, catalog.sample.fields)
    with pytest.raises(DataError) as error:
        StreamReader(rows, 0)
    rows.close()  # the filter can be taken away then
    assert str(error.value) == (
        f"{one_chunk}: dataset `packed(values, offsets)` is compressed in chunks of 20000000 (20,000,000 "
        "values, 80,000,000 bytes). To read its rows in random order, 307 bytes have to be decoded for each "
        "byte that is used; expected at most 8. Either give --data.reading memory, if all rows of a rank fit "
        "into its memory, or write the file in smaller chunks: `h5repack -l values:CHUNK=131072 "
        f"{one_chunk} repacked.h5`."
    )


@pytest.mark.parametrize(
    ("places", "line"),
    [
        ({"inputs": "table[x,y]", "targets": "table[kind]"}, "table:CHUNK=32768"),
        ({"inputs": "across", "targets": "kinds", "samples_axis": -1}, "across:CHUNK=3x32768"),
        ({"inputs": "packed(values, offsets)", "max_length": 4}, "values:CHUNK=131072"),
    ],
)
def test_the_line_that_writes_smaller_chunks_has_the_axes_of_the_file(
    places: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repack = hdf5_tool("h5repack")
    path, rows = tmp_path / "a.h5", 200_000
    table = np.zeros(rows, [("x", "f4"), ("y", "f4"), ("kind", "i8")])
    table["x"], table["kind"] = np.arange(rows), np.arange(rows) % 3
    gzip: dict[str, Any] = {"compression": "gzip", "compression_opts": 1}
    with h5py.File(path, "w") as file:
        file.create_dataset("table", data=table, chunks=(rows,), **gzip)
        across = np.arange(3 * rows, dtype="f4").reshape(3, rows)
        file.create_dataset("across", data=across, chunks=(3, rows), **gzip)
        file.create_dataset("values", data=np.arange(2 * rows, dtype="f4"), chunks=(2 * rows,), **gzip)
        file["offsets"], file["targets"] = np.arange(0, 2 * rows + 1, 2), np.arange(rows) % 3
        file["kinds"] = (np.arange(rows) % 3)[np.newaxis]
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", 64 << 10)
    catalog = catalog_of(path, **places)
    with pytest.raises(DataError) as error:
        Rows(catalog.train, catalog.sample.fields).require_in_order()
    (command,) = (part for part in str(error.value).split("`") if part.startswith("h5repack"))
    assert command == f"h5repack -l {line} {path} repacked.h5"
    subprocess.run([repack, *command.split()[1:]], cwd=tmp_path, check=True)
    monkeypatch.undo()
    for name, values in all_rows(path, **places).items():
        np.testing.assert_array_equal(all_rows(tmp_path / "repacked.h5", **places)[name], values)
    rows, _ = in_order(tmp_path / "repacked.h5", 64, **places)
    rows.close()


def test_a_part_of_each_virtual_row_takes_the_memory_of_some_rows(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file.create_dataset("d", (300_000, 256), "f4")[:, 3] = np.arange(300_000)  # 293 MiB
    layout = h5py.VirtualLayout((300_000, 256), "f4")
    layout[:] = h5py.VirtualSource("source.h5", "d", (300_000, 256))
    with h5py.File(tmp_path / "a.h5", "w", libver="v110") as file:
        file.create_virtual_dataset("inputs", layout)
        file["targets"] = np.zeros(300_000, np.int8)
    tracemalloc.start()
    try:
        found = all_rows(tmp_path / "a.h5", inputs="inputs[3]", follow_links=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found["inputs[3]"], np.arange(300_000))
    assert peak < 80 * MIB


def test_shard_write_refuses_chunks_that_it_would_decode_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", (3000, 300), "f4", chunks=(3000, 300), compression="gzip")
        file["targets"] = np.zeros(3000, np.int8)
    monkeypatch.setattr("hvd_train.data.layout.HELD_BYTES", 500_000)
    with pytest.raises(DataError) as error:
        Hdf5Source([str(path)], {"inputs": "inputs", "targets": "targets"})
    assert str(error.value) == (
        f"{path}: dataset `inputs` is compressed in chunks of 3000x300 (900,000 values, 3,600,000 bytes). To "
        "read its rows in order, each chunk has to be decoded 8 times; expected at most 4. Write the file in "
        f"smaller chunks: `h5repack -l inputs:CHUNK=256x300 {path} repacked.h5`."
    )
