"""Types of numbers that torch or NumPy lacks, or has in another byte order: trained on, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5py import h5d, h5s, h5t

import hvd_train
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, StopConfig
from hvd_train.data.format import Array
from hvd_train.errors import DataError
from tests.unit.data.ragged import catalog_of, read
from tests.unit.data.test_hdf5_types import custom_float, enumeration

INPUTS = np.random.default_rng(0).normal(size=(40, 6))
TARGETS = (INPUTS[:, 0] > 0).astype("i8")
BFLOAT16 = custom_float(2, (15, 7, 8, 0, 7), 127)
BITS = INPUTS.astype("<f4").view("<u4") & 0xFFFF0000


def write(path: Path, **datasets: tuple[Any, Array]) -> Path:
    """Datasets of these HDF5 types, with the bytes of these arrays."""
    with h5py.File(path, "w") as file:
        for name, (kind, values) in datasets.items():
            shape = values.shape[:1] if name == "targets" else INPUTS.shape
            dataset = h5d.create(file.id, name.encode(), kind, h5s.create_simple(shape))
            dataset.write(h5s.ALL, h5s.ALL, np.frombuffer(values.tobytes(), "u1"), mtype=kind)
    return path


PLAIN = (h5t.IEEE_F64LE, INPUTS)
LABELS = (h5t.STD_I64LE, TARGETS)


@pytest.mark.parametrize(
    ("inputs", "targets", "dtypes", "expected"),
    [
        ((h5t.IEEE_F16LE, INPUTS.astype("<f2")), LABELS, ("float16", "int64"), INPUTS.astype("f2")),
        ((h5t.IEEE_F16BE, INPUTS.astype(">f2")), LABELS, ("float16", "int64"), INPUTS.astype("f2")),
        ((BFLOAT16, (BITS >> 16).astype("<u2")), LABELS, ("float32", "int64"), BITS.view("<f4")),
        ((h5t.IEEE_F64BE, INPUTS.astype(">f8")), LABELS, ("float64", "int64"), INPUTS),
        pytest.param(
            (h5t.NATIVE_LDOUBLE, INPUTS.astype("g")),
            LABELS,
            ("float64", "int64"),
            INPUTS,
            marks=pytest.mark.skipif(np.dtype("g").itemsize != 16, reason="long double is another type here"),
        ),
        (
            PLAIN,
            (enumeration(h5t.STD_I32BE, cat=0, dog=1), TARGETS.astype(">i4")),
            ("float64", "int32"),
            INPUTS,
        ),
        (
            PLAIN,
            (enumeration(h5t.STD_I8LE, FALSE=0, TRUE=1), TARGETS.astype("i1")),
            ("float64", "bool"),
            INPUTS,
        ),
    ],
    ids=["float16", "big-endian float16", "bfloat16", "big-endian", "long double", "enumeration", "booleans"],
)
def test_trained_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    inputs: tuple[Any, Array],
    targets: tuple[Any, Array],
    dtypes: tuple[str, str],
    expected: Array,
) -> None:
    path = write(tmp_path / "a.h5", inputs=inputs, targets=targets)
    assert main(["shard", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{dtypes[0]} [6]" in out
    assert f"{dtypes[1]} []" in out
    catalog = catalog_of(path, max_length=None)
    assert tuple(field.dtype for field in catalog.sample.fields.values()) == dtypes
    batch = read(catalog)
    np.testing.assert_array_equal(batch["inputs"], expected)
    np.testing.assert_array_equal(batch["targets"], TARGETS)
    result = hvd_train.train(
        Config(
            name="r",
            runs=str(tmp_path),
            backend="solo",
            threads=1,
            data=DataConfig(path=str(path), validation=0.2),
            stop=StopConfig(patience=0, max_rounds=2),
        )
    )
    assert result.final < 0.5


@pytest.mark.parametrize(
    ("inputs", "seen"),
    [
        (
            1.5,
            r"is a single value\. Expected samples along its first axis; the file has `inputs` \[\] ",
        ),
        (
            h5py.Empty("f4"),
            r"is without values \(a null dataspace\)\. Expected samples along its first axis; ",
        ),
    ],
    ids=["scalar", "null"],
)
def test_datasets_without_an_axis(tmp_path: Path, inputs: Any, seen: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"], file["x"], file["targets"] = inputs, INPUTS, TARGETS
    message = (
        rf"a\.h5: dataset `inputs` {seen}.*Set data\.inputs and data\.targets to the names of the datasets"
    )
    with pytest.raises(DataError, match=message):
        catalog_of(tmp_path / "a.h5", max_length=None)
    assert main(["shard", "info", str(tmp_path / "a.h5")]) == 2
    np.testing.assert_array_equal(
        read(catalog_of(tmp_path / "a.h5", max_length=None, inputs="x"))["x"], INPUTS
    )


def test_inputs_without_a_number(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["inputs"], file["x"], file["targets"] = np.zeros((40, 0)), INPUTS, TARGETS
    with pytest.raises(DataError) as refused:
        catalog_of(tmp_path / "a.h5", max_length=None)
    assert str(refused.value) == (
        f"{tmp_path / 'a.h5'}: `inputs` has the shape [0] a sample; expected one number or more. Name "
        "another dataset in data.inputs."
    )
    catalog_of(tmp_path / "a.h5", max_length=None, inputs="x")
