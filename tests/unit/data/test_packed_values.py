"""Values by the attributes of netCDF and the CF conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from hvd_train.tools import shard

ROWS = 40
TARGETS = np.arange(ROWS) % 3


def written(path: Path, values: Any, *, name: str = "inputs", options: Any = None, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values, **(options or {})).attrs.update(attributes)
        file["targets" if name == "inputs" else "inputs"] = (
            TARGETS if name == "inputs" else np.zeros((ROWS, 2))
        )
    return path


def opened(path: Path, **data: Any) -> Catalog:
    return open_catalog(DataConfig(path=str(path), **data))


def read(catalog: Catalog, name: str = "inputs") -> np.ndarray[Any, Any]:
    rows = Rows(catalog.train, {name: catalog.sample.fields[name]})
    try:
        return rows.read(0, len(rows))[name]
    finally:
        rows.close()


RAW = np.random.default_rng(0).integers(-9000, 9000, (ROWS, 6)).astype("i2")


@pytest.mark.parametrize("options", [{}, {"chunks": (7, 6), "compression": "gzip"}, {"chunks": (ROWS, 1)}])
@pytest.mark.parametrize("inputs", ["inputs", "inputs[1:4]"])
def test_packed_values_are_unpacked(tmp_path: Path, options: dict[str, Any], inputs: str) -> None:
    raw = RAW.copy()
    raw[::9, 2] = -32767
    path = written(
        tmp_path / "a.nc",
        raw,
        options=options,
        scale_factor=2e-6,
        add_offset=0.05,
        _FillValue=np.array([-32767], "i2"),
        long_name="a name",
    )
    catalog = opened(tmp_path, inputs=inputs)
    expected = np.where(raw == -32767, np.nan, raw * 2e-6 + 0.05).astype("f4")
    expected = expected if inputs == "inputs" else expected[:, 1:4]
    assert str(catalog.sample.fields[inputs]) == f"float32 {list(expected.shape[1:])}"
    np.testing.assert_array_equal(read(catalog, inputs), expected)
    assert catalog.warnings == (
        f"{path}: `{inputs}` is read by its attributes scale_factor 2e-06, add_offset 0.05, _FillValue -32767"
        "; what is missing by them is NaN.",
    )


@pytest.mark.parametrize(
    ("values", "attributes", "dtype", "expected"),
    [
        (np.array([1, 2, 3], "i1"), {"scale_factor": 0.5}, "float32", [0.5, 1, 1.5]),
        (np.array([1, 2, 3], "i2"), {"add_offset": 1e6}, "float32", [1000001, 1000002, 1000003]),
        (np.array([1, 2, 3], "i2"), {"scale_factor": 1e-3, "add_offset": 1e6}, "float64", None),
        (np.array([1, 2, 3], "i4"), {"scale_factor": 0.5}, "float64", [0.5, 1, 1.5]),
        (np.array([1, 2, 3], ">f4"), {"scale_factor": 2.0}, "float32", [2, 4, 6]),
        (np.array([1, 1e20, 3], "f4"), {"_FillValue": np.float32(1e20)}, "float32", [1, np.nan, 3]),
        (np.array([1, 2, 3], "f8"), {"missing_value": [1.0, 3.0]}, "float64", [np.nan, 2, np.nan]),
        (np.array([1, np.nan, 3], "f4"), {"_FillValue": np.float32("nan")}, "float32", [1, np.nan, 3]),
        (np.array([1, 2, 3], "f4"), {"valid_range": [1.5, 2.5]}, "float32", [np.nan, 2, np.nan]),
        (np.array([1, 2, 3], "i2"), {"scale_factor": 2.0, "valid_max": 2}, "float32", [2, 4, np.nan]),
        (np.array([-1, 2, 3], "i1"), {"_Unsigned": "true"}, "uint8", [255, 2, 3]),
        (
            np.array([-1, 2, -2], "i1"),
            {"_Unsigned": "true", "scale_factor": 2.0, "_FillValue": np.int8(-1)},
            "float32",
            [np.nan, 4, 508],
        ),
        (np.array([1, 2, 3], "u1"), {"_FillValue": np.uint8(255)}, "uint8", [1, 2, 3]),
        (np.array([1, 2, 3], "u1"), {"units": "m", "valid_min": 1}, "uint8", [1, 2, 3]),
    ],
)
def test_values_by_attributes(
    tmp_path: Path, values: Any, attributes: dict[str, Any], dtype: str, expected: list[float] | None
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"], file["targets"] = values[:, None], np.arange(3)
        file["inputs"].attrs.update(attributes)
    catalog = opened(tmp_path / "a.h5")
    assert catalog.sample.fields["inputs"].dtype == dtype
    if expected is None:  # float32 would round the steps of 0.001 away
        expected = [1000000.001, 1000000.002, 1000000.003]
    np.testing.assert_allclose(read(catalog)[:, 0], expected, rtol=1e-12 if dtype == "float64" else 1e-7)


def test_a_value_that_is_missing_among_integers(tmp_path: Path) -> None:
    targets = TARGETS.copy()
    targets[7] = -1
    path = written(tmp_path / "a.h5", targets, name="targets", _FillValue=-1)
    with pytest.raises(
        DataError,
        match=r"a\.h5: dataset `targets`: row 7 has a missing value, read by its attributes _FillValue -1\. "
        r"Expected none in integers that are not packed",
    ):
        opened(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale_factor": "0.5"}, r"the attribute scale_factor is '0\.5'; expected a number"),
        ({"scale_factor": [1.0, 2.0]}, r"the attribute scale_factor is '\[1\. 2\.\]'; expected a number"),
        ({"scale_factor": 0.0}, r"scale_factor is 0 and add_offset 0; expected finite numbers"),
        ({"add_offset": float("nan")}, r"scale_factor is 1 and add_offset nan; expected finite numbers"),
        ({"valid_range": 3}, r"the attribute valid_range is '3'; expected two numbers"),
    ],
)
def test_attributes_that_are_no_such_numbers(
    tmp_path: Path, attributes: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "a.h5", RAW, **attributes)
    with pytest.raises(DataError, match=rf"a\.h5: dataset `inputs`: {message}.*Correct the attribute, or"):
        opened(path)


def test_every_file_has_factors_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (1, 2):
        written(tmp_path / f"{i}.nc", RAW, scale_factor=np.float32(i))
    catalog = opened(tmp_path)
    np.testing.assert_array_equal(read(catalog), np.concatenate([RAW, 2 * RAW]).astype("f4"))
    line = "1.nc: `inputs` is read by its attributes scale_factor 1 (1 other set of them in other files)."
    assert [w.removeprefix(f"{tmp_path}/") for w in catalog.warnings] == [line]
    assert shard.main(["info", str(tmp_path)]) == 0
    assert line in capsys.readouterr().out


def test_attributes_of_our_own_files_say_nothing(tmp_path: Path) -> None:
    """What the values of these are is in their facts."""
    write_part(tmp_path, Arrays(RAW.astype("f4"), TARGETS), part="train", shards=1)
    (path,) = tmp_path.glob("*.h5")
    with h5py.File(path, "a") as file:
        file["inputs"].attrs["scale_factor"] = 2.0
    np.testing.assert_array_equal(read(opened(path)), RAW.astype("f4"))
