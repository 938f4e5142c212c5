"""What a task may predict, what each kind of file holds of it, and what is refused."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_train.after.predict import tables
from hvd_train.after.predict.options import parse
from hvd_train.after.predict.parts import rows_of_part
from hvd_train.after.predict.run import predict
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.data.format import FieldSpec
from hvd_train.errors import ConfigError, UserError
from hvd_train.tasks.base import Batch, Task
from tests.unit.after.predictions import ROWS, options, solo, write_shards
from tests.unit.data.shards import inputs_of
from tests.unit.trainings import Same, small, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small classification of 7 classes."""
    folder = tmp_path_factory.mktemp("trained")
    train(small(folder), 1)
    return folder / "runs" / "r"


class Odd(Same):
    """Predictions of several shapes and types."""

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch["inputs"]
        return {
            "image": x[:, None, :].expand(-1, 2, -1),
            "positive": x[:, 0] > 3,
            "small": (x[:, 0] % 7).to(torch.uint8),
            "half": x.bfloat16(),
            "none": x[:, :0],
        }


def test_predictions_have_any_shape(trained: Path, tmp_path: Path) -> None:
    given = options(trained, tmp_path, id="meta/id")
    predict(given, SoloCommunicator(), Odd())
    with h5py.File(given.out) as file:
        found = {name: file[name][:] for name in ("image", "positive", "small", "half", "none", "meta/id")}
    np.testing.assert_array_equal(found["meta/id"], 10**12 - np.arange(sum(ROWS)))
    x = inputs_of(0, sum(ROWS))
    np.testing.assert_array_equal(found["image"], np.stack([x, x], axis=1))
    np.testing.assert_array_equal(found["positive"], x[:, 0] > 3)
    np.testing.assert_array_equal(found["small"], x[:, 0] % 7)
    np.testing.assert_array_equal(found["half"], torch.from_numpy(x).bfloat16().float())
    assert (found["none"].shape, found["small"].dtype) == ((sum(ROWS), 0), np.uint8)


class Columns(Same):
    """What a table can hold."""

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch["inputs"]
        return {
            "third": x / 3,
            "exact": x[:, 0].double() / 7,
            "half": (x[:, 0] / 9).half(),
            "yes": x[:, 0] > 9,
        }


def text_of(row: int) -> bytes:
    return f'ä"{row:02},'.encode()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_hold_what_hdf5_holds(suffix: str, trained: Path, tmp_path: Path) -> None:
    data = write_shards(tmp_path, text_of)
    given = options(trained, tmp_path, id="id", data=data)
    expected = solo(given, Columns())
    assert expected["id"].tolist() == [text_of(row) for row in range(sum(ROWS))]
    table = tmp_path / f"t.{suffix}"
    predict(replace(given, out=str(table)), SoloCommunicator(), Columns())
    names = ["id", "third_0", "third_1", "third_2", "exact", "half", "yes"]
    if suffix == "csv":
        with open(table, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == names
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        columns["yes"] = tuple(value == "True" for value in columns["yes"])
    else:
        read = pytest.importorskip("pyarrow.parquet").read_table(table)
        assert read.column_names == names
        assert str(read.schema.field("third_0").type) == "float"
        assert (
            read.schema.metadata[b"checkpoint"]
            == (trained / "checkpoints" / "best").read_text().strip().encode()
        )
        columns = read.to_pydict()
    assert [text.encode() for text in columns["id"]] == expected["id"].tolist()
    for i in range(3):
        np.testing.assert_array_equal(np.array(columns[f"third_{i}"], np.float32), expected["third"][:, i])
    for name in ("exact", "half", "yes"):
        np.testing.assert_array_equal(np.array(columns[name], expected[name].dtype), expected[name])


class Wide(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"wide": batch["inputs"][:, :1].expand(-1, 10_001)}


class Twice(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"a": batch["inputs"], "a_1": batch["inputs"][:, 0]}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Odd(), r"`image` has the shape \[2, 3\] a row; expected at most one axis in a \.csv file"),
        (Wide(), r"a row would have 10,001 columns; expected 1 to 10,000"),
        (Twice(), r"two columns of a \.csv file would have the same name"),
    ],
)
def test_tables_refuse_what_they_cannot_hold(task: Task, message: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        predict(options(trained, tmp_path, "t.csv"), SoloCommunicator(), task)
    assert not (tmp_path / "t.csv.parts").exists()


def test_parquet_needs_pyarrow(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pyarrow, which is not .*pip install 'hvd_train\[parquet\]'"):
        predict(options(trained, tmp_path, "t.parquet"), SoloCommunicator())


class NeedsTargets(Same):
    def transform(self, batch: Batch) -> Batch:
        return {"inputs": batch["inputs"] * 2, "targets": batch["targets"].long()}


class NoDict(Same):
    def predict(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["inputs"])


class Total(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"total": batch["inputs"].sum()}


class Complex(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"c": batch["inputs"].to(torch.complex64)}


class Changing(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch["inputs"]
        return {"x": x.double() if 20 in x[:, 0].tolist() else x}


class NamesTheId(Same):
    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"id": batch["inputs"]}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (NeedsTargets(), r"NeedsTargets needs `targets`, but a batch to predict on has `inputs` only"),
        (NoDict(), r"predict of NoDict returned Tensor for rows 0 to 1; expected a dict of tensors by name"),
        (Total(), r"predict gave `total` of torch\.float32 \[\] for 2 rows; expected"),
        (Complex(), r"predict gave `c` of torch\.complex64 \[2, 3\] for 2 rows; expected booleans, integers"),
        (NamesTheId(), r"the task predicts `id`, which is also the dataset of --id"),
        (Changing(), r"gave `x` float32 \[3\] for the first rows, but `x` float64 \[3\] for a later batch"),
    ],
)
def test_tasks_that_cannot_predict(task: Task, message: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        predict(options(trained, tmp_path, id="id"), SoloCommunicator(), task)
    assert (tmp_path / "p.h5.parts").exists() is isinstance(task, Changing)


def test_ids_are_alike_in_all_shards(trained: Path, tmp_path: Path) -> None:
    data = write_shards(tmp_path)
    with h5py.File(tmp_path / "part2.h5", "r+") as file:
        del file["id"]
        file["id"] = np.zeros(ROWS[2], "S8")
    with pytest.raises(UserError, match=r"part2\.h5: a sample of `id` is S8 \[\]; in \S+ it is int64"):
        solo(options(trained, tmp_path, id="id", data=data))
    with pytest.raises(UserError, match=r"no dataset `name`; the file has"):
        solo(options(trained, tmp_path, id="name", data=data))
    with h5py.File(tmp_path / "part0.h5", "r+") as file:
        file["name"] = ["of any length"] * ROWS[0]
    with pytest.raises(UserError, match=r"`name` holds strings\. Expected .* strings of a fixed length"):
        solo(options(trained, tmp_path, id="name", data=data))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "p.txt"], r"--out = 'p.txt': expected a file name that ends in \.h5, \.hdf5, \.csv or"),
        (
            ["--out", "p.h5", "--checkpoint", "newest"],
            "--checkpoint = 'newest': expected best, latest or round-N",
        ),
        (["--out", "p.h5", "--part-rows", "0"], "--part-rows = 0: expected at least 1 row"),
        (["--out", "p.h5", "--batch-size", "-1"], "--batch-size = -1: expected at least 1 row"),
    ],
)
def test_options_that_make_no_sense(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["run", "--data", "x", *args])


@pytest.mark.parametrize(
    ("shape", "rows", "batch", "expected"),
    [
        ((), 10**6, 256, 131_072),  # 1 MiB of float64
        ((10,), 10**9, 256, 104_704),  # 8 MiB, in whole batches
        ((10,), 2 * 10**6, 256, 31_232),  # a 64th
        ((1024, 1024), 100, 256, 1),
        ((256, 256), 10_000, 256, 16),
    ],
)
def test_the_default_size_of_a_part(shape: tuple[int, ...], rows: int, batch: int, expected: int) -> None:
    assert rows_of_part({"x": FieldSpec(shape=shape, dtype="float64")}, rows, batch) == expected
