"""Relatives of faults that users met: the same mechanism by another option, layout, reader or command.

Each part names the mechanism: a fault of the environment is not one of the file; what attributes say of
values is applied or refused. test_parts_of_chunks.py and test_rows_of_any_length.py have others.
"""

from __future__ import annotations

import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5.file import read_info
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen
from hvd_train.data.sources.images import ImageFolder
from hvd_train.data.sources.npz import load_npz
from hvd_train.data.sources.parquet_files import ParquetSource
from hvd_train.errors import DataError, UnsupportedShard
from tests.unit.data.chunked import MIB, NAMES, all_rows, catalog_of
from tests.unit.data.recipes import refusal
from tests.unit.data.shards import write_foreign

# A fault of the environment is not one of the file


@contextmanager
def limited(limit: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


@pytest.mark.parametrize("on_damage", ["error", "skip"])
def test_too_many_open_files_is_not_damage(on_damage: Any, tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "a.h5", 10)
    catalog = catalog_of(path)
    rows = Rows(catalog.train, catalog.sample.fields, screen=Screen(catalog.sample, on_damage=on_damage))
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(UnsupportedShard) as error:
        rows.read(0, 10)
    assert str(error.value) == (
        f"{path}: too many open files: a process may have 3 here. Raise the limit before the start, by "
        "`ulimit -n 4096`, or have fewer files open."
    )
    assert len(rows.read(0, 10)["inputs"]) == 10
    rows.close()


def test_no_memory_to_decode_a_chunk_is_not_damage(tmp_path: Path) -> None:
    """HDF5 fails as it does at damage; `on_damage = "skip"` left the rows out."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        shape = (4, 8 * MIB)
        file.create_dataset("inputs", shape, "f4", chunks=shape, compression="gzip", compression_opts=1)
        file["inputs"][3, 0] = 1
        file["targets"] = np.arange(4) % 2
    catalog = catalog_of(path, max_length=None)
    rows = Rows(catalog.train, catalog.sample.fields, screen=Screen(catalog.sample, on_damage="skip"))
    rows.shard(str(path))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, in_use + 100 * MIB), pytest.raises(UnsupportedShard) as error:
        rows.read(3, 4)
    assert str(error.value) == (
        f"{path}: dataset `inputs`: there is no memory to decode its chunks of 4x8388608 (33,554,432 values, "
        "134,217,728 bytes). Give each rank more memory, or write the file in smaller chunks: `h5repack -l "
        f"inputs:CHUNK=1x8388608 {path} repacked.h5`."
    )
    assert rows.read(3, 4)["inputs"][0, 0] == 1
    rows.close()


def test_a_filter_that_a_source_of_a_virtual_dataset_needs_is_named(tmp_path: Path) -> None:
    source, path = tmp_path / "source.h5", tmp_path / "a.h5"
    with h5py.File(source, "w") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((10, 3))
        creation.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
        dataset = h5py.h5d.create(
            file.id, b"d", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((10, 3)), creation
        )
        dataset.write_direct_chunk((0, 0), b"packed", 0)
    layout = h5py.VirtualLayout((10, 3), "f4")
    layout[:] = h5py.VirtualSource("source.h5", "d", (10, 3))
    with h5py.File(path, "w", libver="v110") as file:
        file.create_virtual_dataset("inputs", layout)
        file["targets"] = np.arange(10) % 2
    with pytest.raises(UnsupportedShard) as error:
        catalog_of(path, follow_links=True, on_damage="skip")
    assert str(error.value) == (
        f"{source}: dataset `d` needs the HDF5 filter number 32999, which is not installed. Install its "
        "plugin and set HDF5_PLUGIN_PATH to the folder of the plugin, or write the file without filters on a "
        "machine that has it: `h5repack -f NONE OLD.h5 NEW.h5`."
    )


def test_a_compression_that_python_lacks_does_not_make_an_npz_file_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, inputs=np.ones((5, 2)), targets=np.arange(5))
    with zipfile.ZipFile(path) as file:
        offsets = [info.header_offset for info in file.infolist()]
    content, zstandard = bytearray(path.read_bytes()), b"\x5d\x00"
    for offset in offsets:
        content[offset + 8 : offset + 10] = zstandard
    at = 0
    while (at := content.find(b"PK\1\2", at)) >= 0:
        content[at + 10 : at + 12] = zstandard
        at += 4
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_npz(path)
    assert str(error.value) == (
        f"{path}: That compression method is not supported. Expected a complete .npz file with plain numeric "
        "arrays: write it again by numpy.savez, or by numpy.savez_compressed."
    )


def test_a_compression_that_pyarrow_lacks_does_not_make_a_parquet_file_damaged(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = arrow.table({"inputs": np.ones(5), "targets": np.arange(5)})
    parquet.write_table(table, path, compression="snappy", use_dictionary=False)
    # The codec of each column: a field of Thrift behind the column's name, which ends in "s".
    content = path.read_bytes()
    assert content.count(b"s\x15\x02") == 2
    path.write_bytes(content.replace(b"s\x15\x02", b"s\x15\x06"))  # LZO
    with pytest.raises(DataError) as error:
        list(ParquetSource([str(path)], {"inputs": "inputs", "targets": "targets"}, "", ()).blocks())
    assert str(error.value).endswith(
        "The file need not be damaged: write it again without that, such as by compression='zstd'."
    )


# What attributes say of the values is applied or refused

RAW = np.arange(30, dtype="i2").reshape(10, 3)
PACKED = {"scale_factor": 0.5, "add_offset": 1.0, "_FillValue": np.int16(7)}
MEANT = np.where(RAW == 7, np.nan, RAW * 0.5 + 1).astype("f4")


def targets(file: h5py.File) -> None:
    file["targets"] = np.arange(10) % 3


def virtual_of_packed(folder: Path) -> Path:
    with h5py.File(folder / "source.h5", "w") as file:
        file["d"] = RAW
        file["d"].attrs.update(PACKED)
    layout = h5py.VirtualLayout((10, 3), "i2")
    layout[:] = h5py.VirtualSource("source.h5", "d", (10, 3))
    with h5py.File(folder / "a.h5", "w", libver="v110") as file:
        file.create_virtual_dataset("inputs", layout)
        targets(file)
    return folder / "a.h5"


def test_attributes_of_the_source_of_a_virtual_dataset_are_asked_for(tmp_path: Path) -> None:
    path = virtual_of_packed(tmp_path)
    with pytest.raises(UnsupportedShard) as error:
        catalog_of(path, follow_links=True)
    source = tmp_path / "source.h5"
    statements = "; ".join(f"file['inputs'].attrs[{n!r}] = source['d'].attrs[{n!r}]" for n in PACKED)
    assert str(error.value) == (
        f"{source}: dataset `d` has the attributes scale_factor = 0.5, add_offset = 1.0, _FillValue = 7, but "
        f"virtual dataset `inputs` of {path}, which has its values, does not. Expected the same of every "
        "source, and of the virtual dataset, whose attributes are applied: write them, with h5py, from "
        f"`source = h5py.File({str(source)!r})` to `file = h5py.File({str(path)!r}, 'r+')`: `{statements}`."
    )
    with h5py.File(source) as old, h5py.File(path, "r+") as new:
        exec(statements, {"source": old, "file": new})
    np.testing.assert_array_equal(all_rows(path, follow_links=True)["inputs"], MEANT)


def test_rows_of_variable_length_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("inputs", (10,), h5py.vlen_dtype("i2"))
        for row in range(10):
            dataset[row] = RAW[row, : 1 + row % 3]
        dataset.attrs.update(PACKED)
        targets(file)
    found = all_rows(path, max_length=3)
    marks = np.arange(3) < (1 + np.arange(10) % 3)[:, np.newaxis]
    np.testing.assert_array_equal(found["inputs_mask"], marks)
    np.testing.assert_array_equal(found["inputs"], np.where(marks, MEANT, 0))
    assert found["inputs"].dtype == np.float32
    assert read_info(path, plain(NAMES, 3)).unpacked == (
        "`inputs` is unpacked by scale_factor and add_offset: int16 * 0.5 + 1.0, 7 is NaN",
    )


def test_a_missing_value_among_integers_of_variable_length_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("inputs", (10,), h5py.vlen_dtype("i2"))
        for row in range(10):
            dataset[row] = RAW[row, : 1 + row % 3]
        dataset.attrs["_FillValue"] = np.int16(RAW[5, 1])
        targets(file)
    with pytest.raises(UnsupportedShard, match=r"dataset `inputs` holds 16 in row 5, a missing value by its"):
        all_rows(path, max_length=3)


def test_attributes_of_a_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros(10, [("x", "i2"), ("y", "i2")])
        file["table"].attrs["scale_factor"] = 0.5
        targets(file)
    assert refusal(path, ("table[x,y]", "targets")) == (
        f"{path}: dataset `table` is a table with the attributes scale_factor. Expected such attributes at "
        "datasets of numbers only: write the columns as datasets of their own, each with its attributes, or, "
        "if the values are stored as they are meant, remove them, with h5py, from `file = h5py.File(NAME, "
        "'r+')`: `del file['table'].attrs['scale_factor']`."
    )
    with h5py.File(path, "r+") as file:
        del file["table"].attrs["scale_factor"]
    assert all_rows(path, inputs="table[x,y]")["table[x,y]"].shape == (10, 2)


def test_attributes_of_other_conventions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["inputs"] = RAW
        file["inputs"].attrs.update(gain=0.5, offset=-32.0, units="dBZ")
        targets(file)
    assert read_info(path, plain(NAMES)).unpacked == (
        "`inputs` has the attributes gain, offset, which are not applied: if values are stored in other "
        "units by them, write those that are meant",
    )


def test_an_empty_array_of_matlab_is_no_sample(tmp_path: Path) -> None:
    """Its values are the lengths of its axes."""
    path = tmp_path / "a.mat"
    with h5py.File(path, "w") as file:
        for name in NAMES:
            file[name] = np.array([0, 5], "u8")
            file[name].attrs.update(MATLAB_class=np.bytes_("double"), MATLAB_empty=np.uint8(1))
    assert refusal(path) == (
        f"{path}: dataset `inputs` is an empty array of MATLAB: its values are the lengths of the axes. "
        "Expected at least 1 sample: leave the file out."
    )
    with h5py.File(path, "r+") as file:
        for name in NAMES:
            file[name].attrs["MATLAB_empty"] = np.uint8(0)
    assert read_info(path, plain(NAMES)).num_samples == 2


@pytest.mark.parametrize("name", ["A.H5", "a.NC", "a.nxs", "a.cxi", "a.loom"])
def test_files_of_other_endings_are_found_in_a_folder(name: str, tmp_path: Path) -> None:
    write_foreign(tmp_path / name, 10)
    assert [shard.path for shard in locate(str(tmp_path), "data.path").train] == [str(tmp_path / name)]


def test_pixels_of_more_than_8_bits_are_not_cut(tmp_path: Path) -> None:
    """Pillow makes 255 of every larger value."""
    image = pytest.importorskip("PIL.Image")
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        image.fromarray(np.arange(12, dtype="u2").reshape(3, 4) * 5000).save(tmp_path / kind / "0.png")
    with pytest.raises(DataError) as error:
        ImageFolder(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/a/0.png: has more than 8 bits a pixel. Expected 8: convert the images, or save their "
        "pixels with NumPy and give .npy files."
    )


def test_an_image_is_turned_as_its_attributes_say(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(12, dtype="u1").reshape(3, 4)
    (tmp_path / "a").mkdir()
    picture = image.fromarray(pixels)
    attributes = picture.getexif()
    attributes[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture.save(tmp_path / "a" / "0.png", exif=attributes)
    (block,) = ImageFolder(str(tmp_path)).blocks()
    np.testing.assert_array_equal(block["inputs"][0], np.rot90(pixels, -1))


def test_the_frames_of_an_image_after_the_first_are_not_dropped(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    frames = [image.fromarray(np.full((3, 4), value, "u1")) for value in (0, 255)]
    frames[0].save(tmp_path / "a" / "0.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError) as error:
        ImageFolder(str(tmp_path))
    assert str(error.value) == (
        f"{tmp_path}/a/0.tif: has 2 frames. Expected one: save each as a file of its own."
    )
