"""Virtual datasets: every value is that of its source, or the shard is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.deal import Span
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import Places, parse_place, plain
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.errors import DataError, UnsupportedShard
from tests.unit.data.recipes import written_again
from tests.unit.data.shards import inputs_of

WITH_LINKS = plain(("inputs",), follow_links=True)
UNLIMITED = h5py.h5s.UNLIMITED


def rows_of(path: Path, start: int = 0, stop: int | None = None, place: str = "inputs") -> np.ndarray:
    with ShardFile(path, plain((place,), follow_links=True)) as file:
        return file.read(place, start, file.info.num_samples if stop is None else stop)


def refusal(path: Path, error: type[DataError] = DataError) -> str:
    with pytest.raises(error) as refused:
        read_info(path, WITH_LINKS)
    return str(refused.value)


def part(path: Path, values: Any, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, **options)
    return path


def virtual(path: Path, layout: h5py.VirtualLayout, **options: Any) -> Path:
    with h5py.File(path, "w", libver="latest") as file:
        file.create_virtual_dataset("inputs", layout, **options)
    return path


def in_a_row(folder: Path, sizes: tuple[int, ...] = (4, 1, 7), **options: Any) -> Path:
    layout, at = h5py.VirtualLayout((sum(sizes), 3), "f4"), 0
    for number, rows in enumerate(sizes):
        part(folder / f"p{number}.h5", inputs_of(at, rows), **options)
        layout[at : at + rows] = h5py.VirtualSource(f"p{number}.h5", "x", (rows, 3))
        at += rows
    return virtual(folder / "a.h5", layout)


def interleaved(folder: Path) -> Path:
    """Rows 0, 3, 6, ... are of one file, 1, 4, 7, ... of the next."""
    layout = h5py.VirtualLayout((12, 3), "f4")
    for number in range(3):
        part(folder / f"p{number}.h5", inputs_of(0, 12)[number::3], chunks=(2, 3), compression="gzip")
        layout[number::3] = h5py.VirtualSource(f"p{number}.h5", "x", (4, 3))
    return virtual(folder / "a.h5", layout)


def side_by_side(folder: Path) -> Path:
    """The modules of a detector, between them a gap, which is the fill value."""
    layout = h5py.VirtualLayout((12, 5), "f4")
    for number, columns in enumerate((slice(0, 2), slice(3, 5))):
        part(folder / f"p{number}.h5", inputs_of(0, 14, 4)[:, 2 * number : 2 * number + 2])
        layout[:, columns] = h5py.VirtualSource(f"p{number}.h5", "x", (14, 2))[:12]
    return virtual(folder / "a.h5", layout, fillvalue=-1)


def rows_of_files(folder: Path) -> Path:
    """Each file has one row, without an axis of rows."""
    layout = h5py.VirtualLayout((12, 3), "f4")
    for number in range(12):
        part(folder / f"p{number}.h5", inputs_of(number, 1)[0], chunks=(2,))
        layout[number] = h5py.VirtualSource(f"p{number}.h5", "x", (3,))
    return virtual(folder / "a.h5", layout)


def of_one_long_row(folder: Path) -> Path:
    """Rows that are parts of a row of the source."""
    part(folder / "p.h5", inputs_of(0, 12).reshape(2, 18))
    layout = h5py.VirtualLayout((12, 3), "f4")
    source = h5py.VirtualSource("p.h5", "x", (2, 18))
    layout[:6], layout[6:] = source[0], source[1]
    return virtual(folder / "a.h5", layout)


def of_itself(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w", libver="latest") as file:
        file["x"] = inputs_of(0, 24)
        layout = h5py.VirtualLayout((12, 3), "f4")
        layout[...] = h5py.VirtualSource(".", "x", (24, 3))[:12]
        file.create_virtual_dataset("inputs", layout)
    return folder / "a.h5"


def of_a_virtual_one(folder: Path) -> Path:
    in_a_row(folder).rename(folder / "inner.h5")
    layout = h5py.VirtualLayout((12, 3), "f8")
    layout[...] = h5py.VirtualSource("inner.h5", "inputs", (12, 3))
    return virtual(folder / "a.h5", layout)


def numbered(folder: Path, file_name: str = "p%b.h5", name: str = "x", count: int = 3) -> Path:
    """As detectors write them that do not know how many files there will be."""
    for number in range(count):
        with h5py.File(folder / file_name.replace("%b", str(number)).replace("%%", "%"), "a") as file:
            file[name.replace("%b", str(number))] = inputs_of(4 * number, 4)
    with h5py.File(folder / "a.h5", "w", libver="latest") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        space = h5py.h5s.create_simple((0, 3), (UNLIMITED, 3))
        space.select_hyperslab((0, 0), (UNLIMITED, 1), (4, 1), (4, 3))
        plan.set_virtual(space, file_name.encode(), name.encode(), h5py.h5s.create_simple((4, 3)))
        h5py.h5d.create(file.id, b"inputs", h5py.h5t.IEEE_F32LE, space, plan)
    return folder / "a.h5"


def numbered_datasets(folder: Path) -> Path:
    return numbered(folder, "100%%.h5", "entry/x_%b")


def both_numbered(folder: Path) -> Path:
    return numbered(folder, "p%b.h5", "x_%b")


def growing(folder: Path, lengths: tuple[int, ...] = (4, 4, 4)) -> Path:
    """Interleaved, and as long as the sources are."""
    layout = h5py.VirtualLayout((12, 3), "f4", maxshape=(None, 3))
    for number, rows in enumerate(lengths):
        values = inputs_of(0, 12)[number::3][:rows]
        part(folder / f"p{number}.h5", values, maxshape=(None, 3), chunks=(2, 3))
        source = h5py.VirtualSource(f"p{number}.h5", "x", (4, 3), maxshape=(None, 3))
        layout[number:UNLIMITED:3] = source[0:UNLIMITED]
    return virtual(folder / "a.h5", layout)


BUILDERS = [
    in_a_row,
    interleaved,
    side_by_side,
    rows_of_files,
    of_one_long_row,
    of_itself,
    of_a_virtual_one,
    numbered,
    numbered_datasets,
    both_numbered,
    growing,
]


@pytest.mark.parametrize("build", BUILDERS)
def test_rows_are_those_of_the_sources(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    """As HDF5 itself reads them, from any row to any other."""
    path = build(tmp_path)
    with h5py.File(path) as file:
        expected = file["inputs"][...]
    assert len(expected) == 12
    for start in range(12):
        for stop in range(start + 1, 13):
            np.testing.assert_array_equal(rows_of(path, start, stop), expected[start:stop])
    np.testing.assert_array_equal(rows_of(path, place="inputs[1:]"), expected[:, 1:])
    rows = Rows([Span(str(path), 1, 12)], read_info(path, WITH_LINKS).fields)
    reader = StreamReader(rows, 0, block_bytes=24, window_blocks=2)
    read = np.concatenate([reader.next_batch(4)["inputs"] for _ in range(3)])
    np.testing.assert_array_equal(read[np.argsort(read[:, 0], kind="stable")], expected[1:])
    reader.close()


def test_columns_of_a_virtual_table(tmp_path: Path) -> None:
    table = np.array([(i, 2 * i, b"a") for i in range(8)], [("x", "f4"), ("y", "i2"), ("s", "S1")])
    layout = h5py.VirtualLayout((8,), table.dtype)
    for number in range(2):
        part(tmp_path / f"p{number}.h5", table[4 * number : 4 * number + 4])
        layout[4 * number : 4 * number + 4] = h5py.VirtualSource(f"p{number}.h5", "x", (4,))
    path = virtual(tmp_path / "a.h5", layout)
    assert rows_of(path, 3, 6, "inputs[y,x]").tolist() == [[6, 3], [8, 4], [10, 5]]
    assert rows_of(path, 3, 6, "inputs[x]").tolist() == [3, 4, 5]


def missing(path: Path, name: str) -> str:
    return (
        f"{path}: virtual dataset `inputs` leads to {name}, but there is no file {path.parent / name}. "
        "Expected every file that a shard leads to: put it there, or write the shard without it."
    )


@pytest.mark.parametrize("build", [in_a_row, interleaved, side_by_side, numbered, both_numbered, growing])
@pytest.mark.parametrize("number", [0, 1])
def test_a_source_file_that_is_missing(tmp_path: Path, build: Callable[[Path], Path], number: int) -> None:
    """HDF5 reads fill values, or fewer rows."""
    path = build(tmp_path)
    (tmp_path / f"p{number}.h5").unlink()
    assert refusal(path) == missing(path, f"p{number}.h5")


def test_a_source_file_that_goes_missing_while_it_is_read(tmp_path: Path) -> None:
    with ShardFile(in_a_row(tmp_path), WITH_LINKS) as file:
        assert file.read("inputs", 0, 4)[3, 0] == 3
        (tmp_path / "p2.h5").unlink()
        with pytest.raises(DataError) as refused:
            file.read("inputs", 4, 9)
    assert str(refused.value) == (
        f"{tmp_path / 'p2.h5'}: no such file. Expected an HDF5 file that every rank can see."
    )


def test_a_source_dataset_that_is_missing(tmp_path: Path) -> None:
    path = numbered_datasets(tmp_path)
    with h5py.File(tmp_path / "100%.h5", "r+") as file:
        del file["entry/x_1"]
    assert refusal(path) == (
        f"{tmp_path / '100%.h5'}: no dataset `entry/x_1`, of which {path}: virtual dataset `inputs` has "
        "values. Put it there, or write the virtual dataset without it."
    )


@pytest.mark.parametrize("build", [in_a_row, interleaved])
def test_a_source_that_is_too_short(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    path = build(tmp_path)
    part(tmp_path / "p2.h5", inputs_of(0, 3))
    message = refusal(path)
    assert message.startswith(f"{tmp_path / 'p2.h5'}: dataset `x` has "), message
    assert message.endswith(
        f"are expected by {path}: virtual dataset `inputs`. The file is incomplete: copy it again, or write "
        "the virtual dataset for what is there."
    )


def test_a_source_that_did_not_grow_as_far_as_the_others(tmp_path: Path) -> None:
    path = growing(tmp_path, (4, 3, 3))
    assert len(rows_of(path)) == 10
    path = growing(tmp_path, (4, 2, 3))
    assert refusal(path) == (
        f"{tmp_path / 'p1.h5'}: dataset `x` has 2 rows, but 3 are expected by {path}: virtual dataset "
        "`inputs`. The file is incomplete: copy it again, or write the virtual dataset for what is there."
    )


def test_a_source_outside_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    part(tmp_path / "p.h5", inputs_of(0, 12))
    layout = h5py.VirtualLayout((12, 3), "f4")
    layout[...] = h5py.VirtualSource("../p.h5", "x", (12, 3))
    path = virtual(tmp_path / "shards" / "a.h5", layout)
    assert refusal(path, UnsupportedShard).startswith(
        f"{path}: virtual dataset `inputs` leads to ../p.h5, which is {tmp_path / 'p.h5'}, outside of the "
        "folder"
    )


def test_a_source_whose_dataset_is_an_external_link_out_of_the_folder(tmp_path: Path) -> None:
    """HDF5 would follow it."""
    part(tmp_path / "out.h5", inputs_of(0, 12))
    (tmp_path / "shards").mkdir()
    path = in_a_row(tmp_path / "shards", (12,))
    with h5py.File(tmp_path / "shards" / "p0.h5", "w") as file:
        file["x"] = h5py.ExternalLink("../out.h5", "x")
    assert "`x` leads to ../out.h5, which is" in refusal(path, UnsupportedShard)


def test_virtual_datasets_in_a_cycle(tmp_path: Path) -> None:
    for here, there in (("a.h5", "b.h5"), ("b.h5", "a.h5")):
        layout = h5py.VirtualLayout((12, 3), "f4")
        layout[...] = h5py.VirtualSource(there, "inputs", (12, 3))
        virtual(tmp_path / here, layout)
    assert "is 9 virtual datasets deep, as a cycle of them is" in refusal(tmp_path / "a.h5", UnsupportedShard)


def test_a_filter_that_a_source_needs(tmp_path: Path) -> None:
    path = in_a_row(tmp_path)
    with h5py.File(tmp_path / "p1.h5", "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((1, 3))
        plan.set_filter(40_000, h5py.h5z.FLAG_OPTIONAL)
        dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((1, 3)), plan)
        dataset.write_direct_chunk((0, 0), inputs_of(4, 1).tobytes())
    message = refusal(path, UnsupportedShard)
    assert message.startswith(f"{tmp_path / 'p1.h5'}: dataset `x` needs the HDF5 filter number 40000")


def test_a_source_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = in_a_row(tmp_path, (40, 40), chunks=(10, 3), compression="gzip")
    damaged = tmp_path / "p1.h5"
    with h5py.File(damaged) as file:
        chunk = file["x"].id.get_chunk_info(2)
    content = bytearray(damaged.read_bytes())
    content[chunk.byte_offset + 5 : chunk.byte_offset + chunk.size] = bytes(chunk.size - 5)
    damaged.write_bytes(content)
    assert len(rows_of(path, 0, 60)) == 60
    with pytest.raises(DataError) as refused:
        rows_of(path, 55, 65)
    assert str(refused.value).startswith(f"{damaged}: dataset `x`, rows 15 to 24: ")


@pytest.mark.parametrize("kind", ["columns", "points"])
def test_what_is_not_laid_out_by_rows_is_written_again(tmp_path: Path, kind: str) -> None:
    values = inputs_of(0, 12)
    if kind == "columns":
        part(tmp_path / "p.h5", values, maxshape=(12, None), chunks=True)
        layout = h5py.VirtualLayout((12, 3), "f4", maxshape=(12, None))
        source = h5py.VirtualSource("p.h5", "x", (12, 3), maxshape=(12, None))
        layout[:, 0:UNLIMITED] = source[:, 0:UNLIMITED]
        path, seen = virtual(tmp_path / "a.h5", layout), "grows along another axis than the first"
    else:
        part(tmp_path / "p.h5", values)
        path, seen = tmp_path / "a.h5", "has mappings that are no regular selections"
        with h5py.File(path, "w", libver="latest") as file:
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            space, source = h5py.h5s.create_simple((12, 3)), h5py.h5s.create_simple((12, 3))
            for irregular in (space, source):
                irregular.select_hyperslab((0, 0), (1, 1), block=(5, 3))
                irregular.select_hyperslab((5, 0), (1, 1), block=(7, 3), op=h5py.h5s.SELECT_OR)
                irregular.select_hyperslab((7, 1), (1, 1), block=(2, 1), op=h5py.h5s.SELECT_NOTB)
            plan.set_virtual(space, b"p.h5", b"x", source)
            h5py.h5d.create(file.id, b"inputs", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((12, 3)), plan)
        values = values.copy()
        values[7:9, 1] = 0
    message = refusal(path, UnsupportedShard)
    assert message.startswith(
        f"{path}: virtual dataset `inputs` {seen}. Expected rows of its sources one after the other, or side "
        "by side: write it again, with h5py"
    )
    np.testing.assert_array_equal(rows_of(written_again(path, message)), values)


def test_samples_along_another_axis_are_written_again(tmp_path: Path) -> None:
    path = in_a_row(tmp_path)
    with pytest.raises(DataError) as refused:
        read_info(path, Places({"x": parse_place("inputs", "x", -1, True)}, "x", "x"))
    assert "is virtual: its rows are along its first axis, and data.samples_axis names" in str(refused.value)
    written = read_info(
        written_again(path, str(refused.value)), Places({"x": parse_place("inputs", "x", -1)}, "x", "x")
    )
    assert written.num_samples == 3


def test_a_virtual_dataset_of_another_name_is_listed(tmp_path: Path) -> None:
    path = in_a_row(tmp_path)
    with h5py.File(path, "r+") as file:
        file.move("inputs", "entry/data")
        file["entry/kind"] = h5py.ExternalLink("kind.h5", "kind")
    assert refusal(path, UnsupportedShard) == (
        f"{path}: no dataset `inputs`; the file has `entry/data` virtual float32, `entry/kind` (an external "
        "link). Set data.inputs and data.targets to the names of the datasets of inputs and targets."
    )


def test_few_sources_are_open_at_a_time(tmp_path: Path) -> None:
    path = in_a_row(tmp_path, (1,) * 40)
    with ShardFile(path, WITH_LINKS) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 40), inputs_of(0, 40))
        names = [Path(f"/proc/self/fd/{fd}") for fd in range(3, 200)]
        opened = [fd.resolve() for fd in names if fd.is_symlink()]
        assert len([file for file in opened if file.parent == tmp_path]) <= 9


def test_large_chunks_of_sources_are_blocks_of_the_virtual_dataset(tmp_path: Path) -> None:
    """So that a chunk is decoded about once for what is read of it."""
    path = in_a_row(tmp_path, (3000, 3000), chunks=(1000, 3), compression="gzip")
    layout = read_info(path, WITH_LINKS).layouts["inputs"]
    assert (layout.chunk, layout.filtered) == ((1000, 3), True)


@pytest.mark.parametrize(
    ("chunks", "held_bytes", "compression"),
    [(None, 0, None), ((2048, 1024), 4, "gzip"), ((10_000, 64), 20, "gzip")],
)
def test_memory_of_a_stream_is_bounded(
    tmp_path: Path, chunks: tuple[int, int] | None, held_bytes: int, compression: str | None
) -> None:
    """As that of one dataset with the chunks of the sources is."""
    layout = h5py.VirtualLayout((40_000, 1024), "u2")  # 78 MiB
    for number in range(4):
        with h5py.File(tmp_path / f"p{number}.h5", "w") as file:
            file.create_dataset("x", (10_000, 1024), "u2", chunks=chunks, compression=compression)
        layout[10_000 * number : 10_000 * (number + 1)] = h5py.VirtualSource(
            f"p{number}.h5", "x", (10_000, 1024)
        )
    path = virtual(tmp_path / "a.h5", layout)
    tracemalloc.start()
    try:
        reader = StreamReader(Rows([Span(str(path), 0, 40_000)], read_info(path, WITH_LINKS).fields), 0)
        num_rows = 0
        while (batch := reader.next_batch(64)) is not None:
            num_rows += len(batch["inputs"])
        reader.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 40_000
    windows = 64 if chunks is None or chunks[0] < 10_000 else 256
    assert peak < (windows + held_bytes + 8) * 2**20
