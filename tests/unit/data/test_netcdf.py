"""Attributes of netCDF-4 files: packed and missing values are what CF says, or there is one error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import find_shards, open_catalog
from hvd_train.data.hdf5.file import ShardFile, read_info
from hvd_train.data.places import Places, parse_place, plain
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.tools.shard import main

Array = npt.NDArray[Any]
NAN = float("nan")
I2 = np.array([1, 2, -32767, 5], "i2")
F4 = np.array([1, 0.1, 1e20, NAN], "f4")


def netcdf(path: Path, values: Any, **attributes: Any) -> Path:
    """`inputs` with attributes, and `targets`, both along a dimension `time`, as netCDF-4 has them."""
    with h5py.File(path, "w") as file:
        file.attrs["_NCProperties"] = "version=2,netcdf=4.9.2,hdf5=1.14.2"
        file.attrs["_nc3_strict"] = np.int32(1)
        inputs = file.create_dataset("inputs", data=values)
        targets = file.create_dataset("targets", data=np.arange(len(inputs)) % 3)
        time = file.create_dataset("time", shape=(len(inputs),), dtype=">f4")
        time.make_scale("This is a netCDF dimension but not a netCDF variable.         4")
        for dataset in (inputs, targets):
            dataset.dims[0].attach_scale(time)
            dataset.attrs["_Netcdf4Coordinates"] = np.zeros(dataset.ndim, "i4")
        inputs.attrs["ancillary"] = inputs.ref
        inputs.attrs.update(attributes)
    return path


def read(path: Path, *, rows: slice = slice(None)) -> tuple[Array, list[str]]:
    """The inputs of a file, and what was done to them."""
    with ShardFile(path, plain(("inputs", "targets"))) as file:
        start, stop, _ = rows.indices(file.info.num_samples)
        return file.read("inputs", start, stop), list(file.info.unpacked)


UNPACKED = "`inputs` is unpacked by scale_factor and add_offset: int16 * "


@pytest.mark.parametrize(
    ("values", "attributes", "expected", "said"),
    [
        pytest.param(
            I2,
            {"scale_factor": 2e-6, "add_offset": 0.05, "_FillValue": np.int16(-32767)},
            np.array([0.050002, 0.050004, NAN, 0.05001], "f4"),
            UNPACKED + "2e-06 + 0.05, -32767 is NaN",
            id="attributes of float64 that fit into float32",
        ),
        pytest.param(
            I2,
            {"scale_factor": 2e-6, "add_offset": 300.0, "missing_value": [5, -32767]},
            np.array([300.000002, 300.000004, NAN, NAN]),
            UNPACKED + "2e-06 + 300.0, 5 is NaN, -32767 is NaN",
            id="and that do not",
        ),
        pytest.param(
            I2,
            {"scale_factor": np.float32(2e-6), "add_offset": np.array([300], ">f4")},
            np.array([300, 300, 299.93448, 300], "f4"),
            UNPACKED + "2e-06 + 300.0",
            id="attributes of float32",
        ),
        pytest.param(
            I2.astype(">i4"),
            {"scale_factor": np.float32(0.5)},
            np.array([0.5, 1, -16383.5, 2.5]),
            "`inputs` is unpacked by scale_factor: int32 * 0.5",
            id="32 bits",
        ),
        pytest.param(
            I2.astype("i1").reshape(2, 2),
            {"add_offset": 10},
            np.array([[11, 12], [11, 15]], "f4"),
            "`inputs` is unpacked by add_offset: int8 + 10",
            id="an offset alone, of an integer",
        ),
        pytest.param(I2, {"scale_factor": 1.0, "add_offset": 0.0}, I2, "", id="factors that change nothing"),
        pytest.param(I2, {"_FillValue": np.int16(-1), "valid_min": -40000.5}, I2, "", id="nothing missing"),
        pytest.param(
            I2,
            {"_Unsigned": "true", "_FillValue": np.int16(-1), "valid_range": np.array([0, -6], "i2")},
            I2.view("u2"),
            "`inputs` is read as uint16 by _Unsigned",
            id="unsigned integers",
        ),
        pytest.param(
            I2,
            {
                "_Unsigned": np.bytes_("True"),
                "scale_factor": np.float32(0.5),
                "_FillValue": np.int16(-32767),
                "valid_range": np.array([2, -1], "i2"),
            },
            np.array([NAN, 1, NAN, 2.5], "f4"),
            "`inputs` is unpacked by scale_factor: uint16 * 0.5, 32769 is NaN, below 2 is NaN, above 65535 "
            "is NaN",
            id="unsigned integers, packed",
        ),
        pytest.param(
            np.array([200, 3], "u1"), {"_Unsigned": "false"}, np.array([-56, 3], "i1"),
            "`inputs` is read as int8 by _Unsigned", id="signed ones in an unsigned type",
        ),
        pytest.param(
            I2,
            {"scale_factor": 0.5, "valid_min": -10.0, "valid_max": 1.0},
            np.array([0.5, 1, NAN, NAN], "f4"),
            "`inputs` is unpacked by scale_factor: int16 * 0.5, below -10.0 unpacked is NaN, above 1.0 "
            "unpacked is NaN",
            id="bounds of unpacked values",
        ),
        pytest.param(
            I2,
            {"scale_factor": 0.5, "valid_min": np.int16(2)},
            np.array([NAN, 1, NAN, 2.5], "f4"),
            "`inputs` is unpacked by scale_factor: int16 * 0.5, below 2 is NaN",
            id="a bound of packed values",
        ),
        pytest.param(
            F4, {"_FillValue": np.float32(1e20), "missing_value": NAN}, np.array([1, 0.1, NAN, NAN], "f4"),
            "`inputs` has missing values: 1e+20 is NaN", id="floating-point numbers",
        ),
        pytest.param(F4, {"_FillValue": np.float32(NAN)}, F4, "", id="NaN is NaN"),
        pytest.param(
            F4, {"valid_range": [0.1, 5]}, np.array([1, 0.1, NAN, NAN], "f4"),
            "`inputs` has missing values: below 0.1 is NaN, above 5.0 is NaN", id="a range of float64",
        ),
        pytest.param(
            np.array([1, 0.1, 2]), {"scale_factor": 2.0, "missing_value": 0.1}, np.array([2, NAN, 4]),
            "`inputs` is unpacked by scale_factor: float64 * 2.0, 0.1 is NaN", id="float64, packed",
        ),
    ],
)  # fmt: skip
def test_values_are_what_the_attributes_say(
    tmp_path: Path, values: Array, attributes: dict[str, Any], expected: Array, said: str
) -> None:
    seen, lines = read(netcdf(tmp_path / "a.nc", values, **attributes))
    assert seen.dtype == expected.dtype
    np.testing.assert_array_equal(seen, expected)
    assert lines == ([said] if said else [])


def test_every_packed_value_of_16_bits_is_the_nearest_float32_and_different(tmp_path: Path) -> None:
    every = np.arange(-32768, 32768).astype("i2")
    scale, offset = 0.0013, 273.15
    seen, _ = read(netcdf(tmp_path / "a.nc", every, scale_factor=scale, add_offset=offset))
    np.testing.assert_array_equal(seen, (every.astype(float) * scale + offset).astype("f4"))
    assert len(np.unique(seen)) == len(every)


def test_rows_cuts_and_other_axes_are_unpacked(tmp_path: Path) -> None:
    values = np.arange(60, dtype="u1").reshape(10, 6)
    path = netcdf(tmp_path / "a.nc", values, scale_factor=0.5, _FillValue=np.uint8(20))
    seen, _ = read(path, rows=slice(3, 5))
    expected = np.where(values == 20, NAN, values * 0.5)
    np.testing.assert_array_equal(seen, expected[3:5])
    places = {"x": parse_place("inputs[1::2]", "x"), "y": parse_place("inputs[-4]", "x")}
    with ShardFile(path, Places(places, "x", "y")) as file:
        np.testing.assert_array_equal(file.read("x", 2, 9), expected[2:9, 1::2])
        np.testing.assert_array_equal(file.read("y", 2, 9), expected[2:9, -4])
    with ShardFile(path, Places({"x": parse_place("inputs", "x", -1)}, "x", "x")) as file:
        np.testing.assert_array_equal(file.read("x", 1, 4), expected.T[1:4])


@pytest.mark.parametrize(
    ("name", "value", "seen", "expected"),
    [
        ("scale_factor", "0.1", "0.1", "1 number"),
        ("scale_factor", [1.0, 2.0], "[1. 2.]", "1 number"),
        ("scale_factor", NAN, "nan", "a finite number other than 0"),
        ("scale_factor", 0, "0", "a finite number other than 0"),
        ("scale_factor", h5py.Empty("f4"), "Empty(dtype=dtype('<f4'))", "1 number"),
        ("add_offset", float("-inf"), "-inf", "a finite number"),
        ("add_offset", True, "True", "1 number"),
        ("_FillValue", "missing", "missing", "1 number"),
        ("missing_value", np.zeros(101), "[0. 0. ", "1 to 100 numbers"),
        ("valid_range", [0, 1, 2], "[0 1 2]", "2 numbers"),
        ("valid_range", [2, 1], "2, with 1 as the upper bound", "a lower bound that is not above it"),
        ("valid_max", NAN, "[nan]", "finite numbers"),
        ("_Unsigned", "maybe", "['maybe']", "`true` or `false`"),
        ("_Unsigned", 1, "[1]", "`true` or `false`"),
    ],
)  # fmt: skip
def test_a_damaged_attribute_is_one_error_and_can_be_removed(
    tmp_path: Path, name: str, value: Any, seen: str, expected: str
) -> None:
    path = netcdf(tmp_path / "a.nc", I2, **{name: value})
    with pytest.raises(DataError) as error:
        read_info(path, plain(("inputs", "targets")))
    message = str(error.value)
    assert message.startswith(f"{path}: dataset `inputs` has the attribute {name} = {seen}")
    assert f"; expected {expected}. Correct it, or remove it if the values are stored as they are" in message
    remove(path, message)
    np.testing.assert_array_equal(read(path)[0], I2)


def remove(path: Path, message: str) -> None:
    """Does what a message says."""
    opening, statements = re.findall(r"with h5py, from `file = (.*?)`: `(.*?)`\.", message)[0]
    with eval(opening, {"h5py": h5py, "NAME": path}) as file:
        exec(statements, {"file": file})


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({"_FillValue": np.int16(-32767)}, "_FillValue"),
        ({"missing_value": -32767.0, "valid_max": 100}, "missing_value or valid_max"),
        ({"valid_range": [0, 100]}, "valid_range"),
    ],
)
def test_a_missing_value_among_integers_is_refused(
    tmp_path: Path, attributes: dict[str, Any], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = netcdf(tmp_path / "a.nc", I2, **attributes)
    assert len(read(path, rows=slice(0, 2))[0]) == 2
    with pytest.raises(UnsupportedShard) as error:
        read(path, rows=slice(1, 4))
    message = str(error.value)
    assert message.startswith(
        f"{path}: dataset `inputs` holds -32767 in row 2, a missing value by its {names}; expected none "
        "among integers, which cannot be NaN. Leave out such rows, or write floating-point numbers; if it "
        "marks targets without a class, set data.ignore_index = -32767; if it is a value like any other, "
        "remove what marks it, with h5py, from "
    )
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr()
    assert (out.err.strip(), out.out.strip()) == (message, f"{path}: not supported")
    remove(path, message)
    assert main(["check", str(path)]) == 0


def test_targets_with_a_fill_value_are_read_until_one_is_missing(tmp_path: Path) -> None:
    path = netcdf(tmp_path / "a.nc", np.ones((4, 2), "f4"))
    with h5py.File(path, "r+") as file:
        file["targets"].attrs["_FillValue"] = -1
    assert open_catalog(DataConfig(path=str(path))).sample.num_classes == 3
    with h5py.File(path, "r+") as file:
        file["targets"][3] = -1
    with pytest.raises(
        UnsupportedShard, match="dataset `targets` holds -1 in row 3, a missing value by its _F"
    ):
        open_catalog(DataConfig(path=str(path)))


def test_shards_may_have_factors_of_their_own_but_one_type(tmp_path: Path) -> None:
    for index in range(6):
        name = f"{index}.nc" if index < 5 else "5.nc4"
        netcdf(tmp_path / name, I2[:2], scale_factor=0.5 if index < 2 else 1 / (index + 2))
    shards = find_shards(DataConfig(path=str(tmp_path)))
    assert [info.fields["inputs"].dtype for info in shards.train] == ["float32"] * 6
    done = "`inputs` is unpacked by scale_factor: int16 * "
    assert shards.warnings == (
        f"{tmp_path}/0.nc and 1 more: {done}0.5",
        f"{tmp_path}/2.nc: {done}0.25",
        f"{tmp_path}/3.nc: {done}0.2",
        "2 more such lines, which `hvd_train shard info` prints.",
    )
    netcdf(tmp_path / "6.nc", I2[:2])
    with pytest.raises(DataError, match=r"6\.nc: a sample of `inputs` is int16 \[\], but float32 \[\] in"):
        find_shards(DataConfig(path=str(tmp_path)))


def test_shard_info_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [netcdf(tmp_path / f"{i}.nc", I2, scale_factor=1 / (i + 2)) for i in range(5)]
    assert main(["info", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " is unpacked " in line]
    done = "`inputs` is unpacked by scale_factor: int16 *"
    assert lines == [f"{path}: {done} {1 / (i + 2)}" for i, path in enumerate(paths)]
    assert main(["info", str(paths[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["unpacked"] == [f"{done} 0.5"]


def test_shards_of_hvd_train_have_no_such_attributes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.arange(8, dtype="i2").reshape(4, 2), targets=np.arange(4))
    assert main(["write", str(tmp_path / "a.npz"), "--out", str(tmp_path / "d")]) == 0
    (path,) = (tmp_path / "d").glob("*.h5")
    with h5py.File(path, "r+") as file:
        file["inputs"].attrs.update(scale_factor=0.5, _FillValue=np.int16(3))
    seen, lines = read(path)
    np.testing.assert_array_equal(seen, np.arange(8, dtype="i2").reshape(4, 2))
    assert lines == []


def test_a_netcdf_dimension_is_no_dataset(tmp_path: Path) -> None:
    path = netcdf(tmp_path / "a.nc", I2)
    with pytest.raises(
        UnsupportedShard, match=r"dataset `time` is a netCDF dimension without values\. Expected a"
    ):
        read_info(path, plain(("inputs", "time")))


@pytest.mark.parametrize(
    ("first", "seen"),
    [
        (b"CDF\x01", "netCDF-3, expected HDF5. Write it as netCDF-4: `nccopy -k netCDF-4 OLD.nc NEW.nc`."),
        (b"\x0e\x03\x13\x01", "HDF4, expected HDF5. Convert it: `h4toh5convert OLD.hdf NEW.h5`."),
        (b"\xcd\xf3\x00\x01", "a CDF of NASA, expected HDF5. Write its arrays as HDF5."),
        (
            b"MATLAB 5.0 MAT-file, Platform: GLNXA64",
            "a MAT-file before version 7.3, expected HDF5. Save it in MATLAB with '-v7.3', which is HDF5.",
        ),
    ],
)
def test_other_formats_are_named(tmp_path: Path, first: bytes, seen: str) -> None:
    path = tmp_path / "a.nc"
    path.write_bytes(first + bytes(600))
    with pytest.raises(UnsupportedShard) as error:
        find_shards(DataConfig(path=str(tmp_path)))
    assert str(error.value) == f"{path}: {seen}"


def test_a_folder_has_files_of_other_suffixes_only_without_h5(tmp_path: Path) -> None:
    for suffix in ("nc", "nc4", "cdf", "hdf", "he5", "mat", "h5ad"):
        netcdf(tmp_path / f"a.{suffix}", F4[:2])
    assert len(find_shards(DataConfig(path=str(tmp_path))).train) == 7
    path = netcdf(tmp_path / "b.h5", F4[:2])
    assert [info.path for info in find_shards(DataConfig(path=str(tmp_path))).train] == [str(path)]
