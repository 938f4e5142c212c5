"""Datasets of HDF5's variable-length type: rows padded to one length, and hostile lengths."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t

from hvd_train.data.check import check_shard
from hvd_train.data.format import FieldSpec, Padding, SampleSpec
from hvd_train.data.hdf5 import vlen
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.locate import Found
from hvd_train.data.places import plain
from hvd_train.errors import DataError, UnsupportedShard
from tests.launching import run
from tests.unit.data.ragged import catalog_of, padded, read, rows_of_lengths, write_vlen
from tests.unit.data.recipes import hdf5_tool
from tests.unit.data.test_hdf5_types import custom_float, enumeration

BFLOAT16 = custom_float(2, (15, 7, 8, 0, 7), 127)
LENGTHS = [3, 0, 8, 1, 5, 0, 2, 7, 8, 4, 0]
ROWS = rows_of_lengths(LENGTHS)


def write(path: Path, rows: Any = ROWS, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        write_vlen(file, "inputs", rows, **options)
        file["targets"] = np.arange(len(rows)) % 2
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (4,)},
        {"chunks": (4,), "maxshape": (None,)},
        {"chunks": (4,), "compression": "gzip"},
        {"chunks": (4,), "compression": "gzip", "shuffle": True},
        {"chunks": (100,), "maxshape": (None,), "compression": "lzf"},
    ],
    ids=str,
)
def test_rows_and_their_mask(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.h5", **options)
    values, marks = padded(ROWS, 8)
    catalog = catalog_of(path)
    assert list(catalog.sample.fields) == ["inputs", "inputs_mask", "targets"]
    assert catalog.sample.fields["inputs"] == FieldSpec(shape=(8,), dtype="int32", padding=Padding(length=8))
    assert catalog.sample.fields["inputs_mask"] == FieldSpec(
        shape=(8,), dtype="bool", place="inputs", padding=Padding(length=8, marks=True)
    )
    assert catalog.sample.mask_of("inputs") == "inputs_mask"
    assert catalog.sample.mask_of("targets") == catalog.sample.mask_of("inputs_mask") == ""
    assert SampleSpec.from_json(catalog.sample.to_json()) == catalog.sample
    for start in range(len(ROWS)):
        for stop in range(start + 1, len(ROWS) + 1):
            batch = read(catalog, start, stop)
            assert batch["inputs"].dtype == np.int32
            np.testing.assert_array_equal(batch["inputs"], values[start:stop])
            np.testing.assert_array_equal(batch["inputs_mask"], marks[start:stop])
    assert check_shard(Found(str(path)), plain(("inputs", "targets"), 8)).problems == ()


@pytest.mark.parametrize("dtype", ["u1", ">i2", ">u8", "f2", ">f4", "f8", "?"])
def test_types_of_values(tmp_path: Path, dtype: str) -> None:
    rows = rows_of_lengths([2, 0, 5], dtype, low=0)
    batch = read(catalog_of(write(tmp_path / "a.h5", rows)))
    values, _ = padded(rows, 8)
    assert batch["inputs"].dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(batch["inputs"], values)


@pytest.mark.parametrize(
    ("kind", "raw", "dtype", "values"),
    [
        (BFLOAT16, struct.pack("<2H", 0x3FC0, 0xC000), "float32", [1.5, -2]),
        pytest.param(
            h5t.NATIVE_LDOUBLE,
            np.array([1.5, -2], "g").tobytes(),
            "float64",
            [1.5, -2],
            marks=pytest.mark.skipif(np.dtype("g").itemsize != 16, reason="long double is another type here"),
        ),
        (enumeration(h5t.STD_I16BE, one=1, two=-2), struct.pack(">2h", 1, -2), "int16", [1, -2]),
        (h5t.STD_B8LE, b"\1\xfe", "uint8", [1, 254]),
    ],
    ids=["bfloat16", "long double", "enumeration", "bit field"],
)
def test_types_that_numpy_does_not_have(
    tmp_path: Path, kind: Any, raw: bytes, dtype: str, values: list[float]
) -> None:
    """A row of two values, and one without any. The first refers to bytes of a row that h5py can write."""
    path = tmp_path / "a.h5"
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    with h5py.File(path, "w") as file:
        h5d.create(file.id, b"inputs", h5t.vlen_create(kind), h5s.create_simple((2,)), creation)
        write_vlen(file, "bytes", [np.frombuffer(raw, "u1"), np.empty(0, "u1")])
        file["targets"] = np.arange(2)
        inputs, stored = (file[name].id.get_offset() for name in ("inputs", "bytes"))
    content = bytearray(path.read_bytes())
    content[inputs : inputs + 16] = struct.pack("<I", 2) + content[stored + 4 : stored + 16]
    path.write_bytes(content)
    batch = read(catalog_of(path, max_length=3))
    assert batch["inputs"].dtype == np.dtype(dtype)
    assert batch["inputs"].tolist() == [[*values, 0], [0, 0, 0]]


def test_rows_that_were_never_written_are_empty(tmp_path: Path) -> None:
    for name, options in (("a.h5", {}), ("b.h5", {"chunks": (4,), "compression": "gzip"})):
        with h5py.File(tmp_path / name, "w") as file:
            dataset = file.create_dataset("inputs", (9,), h5py.vlen_dtype("f4"), **options)
            if options:
                dataset[1] = np.arange(3)
            file["targets"] = np.arange(9) % 2
        marks = read(catalog_of(tmp_path / name))["inputs_mask"]
        assert marks.sum(axis=1).tolist() == ([0, 3, *[0] * 7] if options else [0] * 9)


def test_a_user_block_before_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        write_vlen(file, "inputs", ROWS)
        file["targets"] = np.arange(len(ROWS)) % 2
    np.testing.assert_array_equal(read(catalog_of(tmp_path / "a.h5"))["inputs"], padded(ROWS, 8)[0])


def test_without_a_length_the_refusal_names_one_that_works(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(UnsupportedShard) as refused:
        catalog_of(path, max_length=None)
    assert str(refused.value) == (
        f"{path}: dataset `inputs` holds rows of variable length (int32), the longest of 8 values in row 2. "
        "Expected a length to which they are padded with zeros: set data.max_length = 8 or more (for `shard "
        "info` and `shard check`, --max-length 8)."
    )
    np.testing.assert_array_equal(read(catalog_of(path, max_length=8))["inputs"], padded(ROWS, 8)[0])


def test_longer_rows_are_refused_or_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(DataError) as refused:
        catalog_of(path, max_length=4)
    assert str(refused.value) == (
        f"{path}: dataset `inputs` has 8 values in row 2; expected at most 4, the given length. Set "
        "data.max_length = 8, the length of the longest row of this file, or more, or cut such rows by "
        "data.truncate = true."
    )
    assert check_shard(Found(str(path)), plain(("inputs", "targets"), 4)).problems == (str(refused.value),)
    batch = read(catalog_of(path, max_length=4, truncate=True))
    values, marks = padded(ROWS, 4)
    np.testing.assert_array_equal(batch["inputs"], values)
    np.testing.assert_array_equal(batch["inputs_mask"], marks)


def test_a_length_that_no_field_needs(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"], file["targets"] = np.zeros((4, 3)), np.arange(4) % 2
    with pytest.raises(DataError, match=r"data\.max_length = 8: no field of a sample in .*a\.h5 has rows of"):
        catalog_of(tmp_path / "a.h5")


def test_a_name_that_the_mask_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(
        DataError, match=r"a\.h5: `inputs_mask` is the name of the mask of `inputs`.*another one"
    ):
        catalog_of(path, fields={"inputs_mask": "targets"})


def test_class_numbers_name_the_row(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"] = np.zeros((3, 8))
        write_vlen(file, "targets", [np.array([5, 9]), np.array([9]), np.array([5, 5, 9])])
    batch = read(catalog_of(tmp_path / "a.h5", classes=("9", "5")))
    assert batch["targets"][:, :3].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    with pytest.raises(
        DataError, match=r"`targets` holds 9 in row 0; expected one of data\.classes: `5`, `7`"
    ):
        catalog_of(tmp_path / "a.h5", classes=("5", "7"))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["targets"][2] = [5, 3]
    with pytest.raises(DataError, match="`targets` holds 3 in row 2"):
        catalog_of(tmp_path / "a.h5", classes=("9", "5"))


def with_length(path: Path, row: int, length: int) -> Path:
    """Changes the recorded length of a row of `inputs`, contiguous or in one chunk."""
    with h5py.File(path) as file:
        dataset = file["inputs"].id
        offset = dataset.get_offset()
        if offset is None:
            offset = dataset.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset + 16 * row)
        raw.write(struct.pack("<I", length))
    return path


READ = """
import resource, sys
from pathlib import Path
from tests.unit.data.ragged import catalog_of, read
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    read(catalog_of(Path(sys.argv[1]), truncate=sys.argv[2] == "cut"))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (16,), "maxshape": (None,)}], ids=["contiguous", "chunked"]
)
@pytest.mark.parametrize("how", ["refused", "cut"])
def test_a_hostile_length_is_refused_before_memory_is_taken(
    tmp_path: Path, options: dict[str, Any], how: str
) -> None:
    path = with_length(write(tmp_path / "a.h5", **options), 4, 2**32 - 1)
    expected = (
        f"DataError: {path}: dataset `inputs` has 4,294,967,295 values of 4 bytes in row 4, in a file of "
        f"{path.stat().st_size:,} bytes. The file is damaged: copy or write it again.\n"
    )
    job = run([sys.executable, "-c", READ, str(path), how], deadline_s=60)
    assert job.stdout == expected, job.stderr
    (problem,) = check_shard(Found(str(path)), plain(("inputs", "targets"), 8)).problems
    assert f"DataError: {problem}\n" == expected
    with pytest.raises(DataError, match="has 4,294,967,295 values of 4 bytes in row 4"):
        catalog_of(path, max_length=None)


def test_a_length_that_is_not_that_of_the_values(tmp_path: Path) -> None:
    path = with_length(write(tmp_path / "a.h5"), 4, 7)
    with pytest.raises(DataError, match=r"a\.h5: dataset `inputs`, rows 0 to 10: .*damaged or changed"):
        read(catalog_of(path))


@pytest.mark.parametrize(
    ("reference", "seen"),
    [
        ((3, 2**40, 1), "there is no heap at 1099511627776"),
        ((3, 0, 1), "there is no heap at 0"),
        ((3, 64, 1), "there is no heap at 64"),
        ((3, None, 9999), "has no object 9999"),
    ],
)
def test_references_that_lead_nowhere(
    tmp_path: Path, reference: tuple[int, int | None, int], seen: str
) -> None:
    path = write(tmp_path / "a.h5")
    length, address, number = reference
    with h5py.File(path) as file:
        offset = file["inputs"].id.get_offset()
    with open(path, "r+b") as raw:
        raw.seek(offset)
        known = struct.unpack("<IQI", raw.read(16))[1]
        raw.seek(offset)
        raw.write(struct.pack("<IQI", length, known if address is None else address, number))
    with pytest.raises(DataError, match=rf"a\.h5: dataset `inputs`, rows 0 to 10: .*{seen}\. It was damaged"):
        read(catalog_of(path))


def test_many_rows_in_bounded_memory(tmp_path: Path) -> None:
    """More values than are read at a time."""
    rows = rows_of_lengths([300_000] * 4 + [1] * 50, "f8")
    path = write(tmp_path / "a.h5", rows)
    with ShardFile(path, plain(("inputs", "targets"), 300_000)) as file:
        found = file.read("inputs", 0, len(rows))
    for row, values in zip(rows, found, strict=True):
        np.testing.assert_array_equal(values[: len(row)], row)


def test_compact_storage_has_a_remedy(tmp_path: Path) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5d.COMPACT)
    kind = h5t.py_create(h5py.vlen_dtype("f4"), logical=True)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        h5d.create(file.id, b"inputs", kind, h5s.create_simple((3,)), creation)
        file["inputs"][1] = np.arange(2)
        file["targets"] = np.arange(3) % 2
    with pytest.raises(UnsupportedShard) as refused:
        catalog_of(tmp_path / "a.h5")
    assert "holds rows of variable length in compact storage. Expected contiguous" in str(refused.value)
    assert "by `h5repack -l inputs:CONTI OLD.h5 NEW.h5`." in str(refused.value)
    repack = hdf5_tool("h5repack")
    old, new = str(tmp_path / "a.h5"), str(tmp_path / "b.h5")
    assert run([repack, "-l", "inputs:CONTI", old, new], deadline_s=60).returncode == 0
    assert read(catalog_of(Path(new)))["inputs"][1, :3].tolist() == [0, 1, 0]


def test_large_chunks_have_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.h5", chunks=(100,), maxshape=(None,), compression="gzip")
    monkeypatch.setattr(vlen, "_MOST_CHUNK_BYTES", 16 * 50)
    with pytest.raises(UnsupportedShard) as refused:
        catalog_of(path)
    assert str(refused.value) == (
        f"{path}: dataset `inputs` is compressed in chunks of 100 rows; expected at most 50. Write it in "
        "smaller ones, by `h5repack -l inputs:CHUNK=11 OLD.h5 NEW.h5`."
    )
    repack, new = hdf5_tool("h5repack"), str(tmp_path / "b.h5")
    assert run([repack, "-l", "inputs:CHUNK=11", str(path), new], deadline_s=60).returncode == 0
    np.testing.assert_array_equal(read(catalog_of(Path(new)))["inputs"], padded(ROWS, 8)[0])


def test_a_filter_that_is_not_here(tmp_path: Path) -> None:
    shutil.copy(write(tmp_path / "a.h5", chunks=(4,), compression="lzf"), tmp_path / "b.h5")
    data = (tmp_path / "b.h5").read_bytes()
    (tmp_path / "b.h5").write_bytes(data.replace(struct.pack("<H", 32000), struct.pack("<H", 32100), 1))
    with pytest.raises(DataError, match=r"b\.h5: dataset `inputs` needs the HDF5 filter .*32100"):
        catalog_of(tmp_path / "b.h5")
