"""Small files that claim to hold much, and files that HDF5 does not survive: refused early."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.locate import Found
from hvd_train.data.places import Places, plain
from hvd_train.errors import DataError, UnsupportedShard
from tests.faults.hdf5_structures import structures_of
from tests.unit.data.recipes import hdf5_tool

NAMES = ("inputs", "targets")
MIB = 1 << 20
ATTRIBUTE = "dataset `inputs` has the attribute"
DAMAGED = "The file is damaged, or was made to exhaust the memory: copy or write it again."


def read_all(path: Path, places: Places) -> None:
    with ShardFile(path, places) as file:
        for name in places.places:
            file.read(name, 0, file.info.num_samples)


def refused(path: Path, *names: str) -> str:
    """Why the header or the rows are refused; `shard check` says the same."""
    places = plain(names or NAMES)
    with pytest.raises(DataError) as error:
        read_all(path, places)
    report = check_shard(Found(str(path)), places)
    assert str(error.value) in (*report.problems, *report.unsupported)
    return str(error.value)


def zeros(num_mib: int) -> bytes:
    """What is unpacked to so many MiB of zeros."""
    packer = zlib.compressobj(9)
    first, block = (packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + (num_mib - 1) * block


def with_chunk(path: Path, raw: bytes, *, times: int = 1) -> Path:
    """Inputs of 100 float32 in one chunk, stored as `raw`, that passed gzip so many times."""
    with h5py.File(path, "w") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((100,))
        for _ in range(times):
            creation.set_deflate(6)
        space = h5py.h5s.create_simple((100,))
        dataset = h5py.h5d.create(file.id, b"inputs", h5py.h5t.IEEE_F32LE, space, creation)
        dataset.write_direct_chunk((0,), raw)
        file["targets"] = np.arange(100) % 7
    return path


def test_a_chunk_that_unpacks_to_a_gigabyte(tmp_path: Path) -> None:
    raw = zeros(1024)
    assert len(raw) < 2 * MIB
    path = with_chunk(tmp_path / "a.h5", raw)
    assert refused(path) == (
        f"{path}: dataset `inputs`, rows 0 to 99: a chunk is stored in {len(raw):,} bytes, but has 400 bytes "
        f"of values. {DAMAGED}"
    )


def test_a_chunk_that_unpacks_to_a_hundred_gigabytes(tmp_path: Path) -> None:
    path = with_chunk(tmp_path / "a.h5", zlib.compress(zeros(100 * 1024), 9), times=2)
    assert path.stat().st_size < MIB
    assert refused(path) == (
        f"{path}: dataset `inputs` is compressed 2 times: gzip, gzip. Expected one compression, as a small "
        "file could unpack to any size. If you trust the file, write it again: `h5repack -f GZIP=4 "
        "OLD.h5 NEW.h5`."
    )


def test_the_remedy_of_chunks_that_are_compressed_twice(tmp_path: Path) -> None:
    values = np.arange(100, dtype="f4")
    path = with_chunk(tmp_path / "a.h5", zlib.compress(zlib.compress(values.tobytes())), times=2)
    (line,) = re.findall(r"`(h5repack .*) OLD\.h5 NEW\.h5`", refused(path))
    tool, *options = line.split()
    subprocess.run([hdf5_tool(tool), *options, path, tmp_path / "new.h5"], check=True)
    with ShardFile(tmp_path / "new.h5", plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 100), values)


def test_filters_that_do_not_compress_may_be_many(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        options = {"scaleoffset": 0, "shuffle": True, "compression": "gzip"}
        file.create_dataset("inputs", data=np.arange(100), chunks=(10,), **options)
        file["targets"] = np.arange(100)
    with ShardFile(tmp_path / "a.h5", plain(NAMES)) as file:
        np.testing.assert_array_equal(file.read("inputs", 0, 100), np.arange(100))


@pytest.mark.parametrize("dataset", ["inputs", "targets"])
def test_a_chunk_of_no_bytes(tmp_path: Path, dataset: str) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name in NAMES:
            options: dict[str, Any] = {"fletcher32": True} if name == "inputs" else {"compression": "lzf"}
            file.create_dataset(name, data=np.arange(300.0), chunks=(64,), **options)
        chunk = file[dataset].id.get_chunk_info(1)
    raw = bytearray(path.read_bytes())
    key = raw.rfind(struct.pack("<I", chunk.size), 0, raw.find(struct.pack("<Q", chunk.byte_offset)))
    raw[key : key + 4] = bytes(4)
    path.write_bytes(raw)
    assert refused(path) == (
        f"{path}: dataset `{dataset}`, rows 64 to 127: a chunk is stored in 0 bytes, but has 512 bytes of "
        f"values. {DAMAGED}"
    )


@pytest.mark.parametrize("shape", [(2**60,), (2**60, 0), (10**9, 3), (2, 2**40)])
def test_rows_that_were_never_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("inputs", shape, "f4", chunks=None if 0 in shape else (1,) * len(shape))
        file.create_dataset("targets", shape[:1], "i1", chunks=(1,))
    assert refused(path) == (
        f"{path}: dataset `inputs` is float32 {list(shape)} in a file of {path.stat().st_size} bytes. The "
        "number of rows is damaged, or most were never written: write it again."
    )


def patched(path: Path, signature: bytes, at: int, number: int) -> None:
    """Puts an integer of 8 bytes into the structures with this signature, and corrects their checksums."""
    raw = bytearray(path.read_bytes())
    found = [s for s in structures_of(bytes(raw)) if raw[s.start : s.start + 4] == signature]
    assert found
    for structure in found:
        struct.pack_into("<Q", raw, structure.start + at, number)
        structure.correct(raw)
    path.write_bytes(raw)


def test_a_group_that_claims_a_billion_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for number in range(20):
            file[f"d{number:02}"] = np.zeros(3)
    patched(path, b"BTHD", 26, 10**9)
    listed = r"`d\d\d` \[3\] float64, " * 11 + r"`d\d\d` \[3\] float64 and 8 more"
    assert re.fullmatch(
        rf".*/a\.h5: no dataset `inputs`; the file has {listed}\. Set data\.inputs .*", refused(path)
    )


def test_an_index_that_claims_more_chunks_than_there_are(tmp_path: Path) -> None:
    """HDF5 goes through all numbers up to the one that the header has."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest", userblock_size=512) as file:
        file.create_dataset(
            "inputs", data=np.arange(300.0), chunks=(7,), maxshape=(None,), compression="gzip"
        )
        file["targets"] = np.arange(300)
    whole = path.read_bytes()
    path.write_bytes(whole[512:])  # addresses count from the end of the user block
    patched(path, b"EAHD", 44, 2**60)
    path.write_bytes(whole[:512] + path.read_bytes())
    assert refused(path) == (
        f"{path}: dataset `inputs`: its index has more chunks than its shape [300] can have. {DAMAGED}"
    )


def test_an_index_of_a_fixed_array_that_claims_more_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("inputs", data=np.arange(300.0), chunks=(7,))
        file["targets"] = np.arange(300)
    patched(path, b"FAHD", 8, 2**60)
    patched(path, b"FAHD", 16, 2**64 - 1)  # as if no chunk had been written
    assert refused(path) == (
        f"{path}: dataset `inputs`: its index has more chunks than its shape [300] can have. {DAMAGED}"
    )


def test_values_that_are_stored_in_fewer_bytes_than_they_have(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["inputs"], file["targets"] = np.arange(300.0), np.arange(300)
        place = struct.pack("<QQ", file["inputs"].id.get_offset(), 2400)
    raw = path.read_bytes()
    assert raw.count(place) == 1
    path.write_bytes(raw.replace(place, place[:8] + struct.pack("<Q", 1200)))
    assert refused(path) == (
        f"{path}: dataset `inputs`: its values are stored in 1,200 bytes, but have 2,400. The file is "
        "damaged: copy or write it again."
    )


def test_datasets_that_shrank_and_grew_are_read(tmp_path: Path) -> None:
    for libver in ("earliest", "latest"):
        for maxshape in ((1000, 8), (None, 8), (None, None)):
            with h5py.File(tmp_path / "a.h5", "w", libver=libver) as file:
                options = {"chunks": (7, 4), "maxshape": maxshape, "compression": "gzip"}
                rows = file.create_dataset("inputs", data=np.ones((900, 8)), **options)
                for length in (3, 60):
                    rows.resize((length, 8))
                file["targets"] = np.arange(60)
            with ShardFile(tmp_path / "a.h5", plain(NAMES)) as file:
                inputs = file.read("inputs", 0, 60)
            assert (inputs[:3].all(), inputs[3:].any()) == (True, False)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (100,)}, {"chunks": (70,), "compression": "gzip", "shuffle": True}],
    ids=["contiguous", "chunked", "gzip"],
)
def test_a_heap_of_strings_that_was_overwritten(tmp_path: Path, options: dict[str, Any]) -> None:
    """HDF5 goes through it without an end."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["inputs"] = np.zeros((300, 3))
        texts = [("cat", "dog")[row % 2] * 50 for row in range(300)]
        file.create_dataset("targets", data=texts, dtype=h5py.string_dtype(), **options)
    data = DataConfig(path=str(path), classes=("cat" * 50, "dog" * 50))
    assert open_catalog(data).sample.num_classes == 2
    raw = bytearray(path.read_bytes())
    heap = raw.find(b"GCOL")
    raw[heap + 1600 : heap + 2600] = bytes(1000)
    path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        open_catalog(data)
    assert str(error.value) == (
        f"{path}: dataset `targets`: the heap of strings at byte {heap} is damaged. Copy or write the "
        "file again."
    )


def test_a_table_of_two_thousand_columns(tmp_path: Path) -> None:
    """HDF5 has no room for many more."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["t"] = np.zeros(5, [(f"c{column}", "f4") for column in range(2000)])
    assert read_info(path, plain(("t[c5,c1999]", "t[c7]"))).fields["t[c5,c1999]"].shape == (2,)
    first = ", ".join(f"`c{column}`" for column in range(12))
    assert refused(path, "t[x]", "t[c7]") == (
        f"{path}: dataset `t` has the columns {first} and 1,988 more; expected `x` in it. Name columns "
        "that it has, or the dataset without brackets."
    )


@pytest.mark.parametrize(
    ("name", "size", "seen"),
    [
        ("scale_factor", 100 * MIB, f"{ATTRIBUTE} scale_factor = [0 0 0 ... 0 0 0]; expected 1 number."),
        ("_Unsigned", MIB, f"{ATTRIBUTE} _Unsigned = [0 0 0 ... 0 0 0]; expected `true` or `false`."),
        ("hvd_train_scale", MIB, "only 0-dimensional arrays can be converted to Python scalars."),
    ],
)
def test_an_attribute_of_a_hundred_megabytes(tmp_path: Path, name: str, size: int, seen: str) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["inputs"], file["targets"] = np.zeros((5, 3), "i2"), np.arange(5)
        file["inputs"].attrs[name] = np.zeros(size, "u1")
    assert refused(path).startswith(f"{path}: {seen}")


def test_facts_of_many_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["inputs"], file["targets"] = np.zeros((5, 3), "i2"), np.arange(5)
        file.attrs["hvd_train_schema"] = 2
        file.attrs["hvd_train_facts"] = np.zeros(10 * MIB, "u1")
        file.attrs["hvd_train_facts_digest"] = np.bytes_("0" * 32)
    assert refused(path) == (
        f"{path}: the metadata in the file is not what was written. It was damaged or changed after it was "
        "written: copy or write it again."
    )


def test_external_links_in_a_cycle(tmp_path: Path) -> None:
    for name, other in (("a.h5", "b.h5"), ("b.h5", "a.h5")):
        with h5py.File(tmp_path / name, "w") as file:
            file["inputs"], file["targets"] = h5py.ExternalLink(other, "/inputs"), np.arange(3)
    with pytest.raises(
        UnsupportedShard, match=r"a\.h5: `inputs` is an external link to b\.h5:/inputs\. Expected"
    ):
        read_info(tmp_path / "a.h5", plain(NAMES))
