"""Predictions in one file: the order of rows, what a second start takes and makes anew, what is refused."""

from __future__ import annotations

import csv
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.after.predict import tables
from hvd_train.after.predict.options import Options, parse
from hvd_train.after.predict.parts import rows_of_part
from hvd_train.after.predict.run import predict
from hvd_train.cli import main
from hvd_train.comm.agree import SetupFailed
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.data.format import FieldSpec
from hvd_train.errors import ConfigError, TaskError, UserError
from hvd_train.run.claim import take
from hvd_train.tasks.base import Batch, Task
from tests.threads import on_ranks
from tests.unit.data.shards import inputs_of
from tests.unit.trainings import Same, small, train

ROWS = (5, 1, 64)
"""Of the shards that are predicted on; ids and inputs run on from one to the next."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small classification of 7 classes."""
    folder = tmp_path_factory.mktemp("trained")
    train(small(folder), 1)
    return folder / "runs" / "r"


def write_shards(folder: Path, ids: Callable[[int], Any] = lambda row: 10**12 - row) -> str:
    """Shards without targets, whose rows have an id; the pattern that names them in order."""
    first = 0
    for number, rows in enumerate(ROWS):
        with h5py.File(folder / f"part{number}.h5", "w") as file:
            file["inputs"] = inputs_of(first, rows)
            file["id"] = np.array([ids(row) for row in range(first, first + rows)])
        first += rows
    return str(folder / "part*.h5")


def options(trained: Path, folder: Path, out: str = "p.h5", **others: Any) -> Options:
    data = others.pop("data", None) or write_shards(folder)
    plain = {"batch_size": 4, "part_rows": 7, "threads": torch.get_num_threads(), **others}
    return Options(run=str(trained), data=data, out=str(folder / out), **plain)


def datasets(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        assert all(file[name].chunks is None for name in file)
        return {name: file[name][:] for name in file}


def solo(given: Options, task: Task | None = None) -> dict[str, np.ndarray]:
    predict(given, SoloCommunicator(), task)
    return datasets(Path(given.out))


def test_rows_are_in_the_order_of_the_shards(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(trained, tmp_path, id="id")
    found = solo(given)
    assert list(found) == ["class", "id", "probability"]
    np.testing.assert_array_equal(found["id"], 10**12 - np.arange(sum(ROWS)))
    model = hvd_train.load_model(trained)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs_of(0, sum(ROWS)))).softmax(dim=1).numpy()
    np.testing.assert_allclose(found["probability"], expected, rtol=1e-5)
    np.testing.assert_array_equal(found["class"], expected.argmax(axis=1))
    assert (found["class"].dtype, found["probability"].dtype) == (np.int64, np.float32)
    with h5py.File(given.out) as file:
        said = dict(file.attrs)
    saved = hvd_train.after.trained.open_trained(trained).saved  # type: ignore[attr-defined]
    assert said == {
        "run": str(trained.resolve()),
        "checkpoint": saved.folder.name,
        "round": saved.round,
        "data": given.data,
        "hvd_train": hvd_train.__version__,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.h5", "part0.h5", "part1.h5", "part2.h5"]
    printed = capsys.readouterr().out
    assert "data      70 rows in 3 shards" in printed
    assert "parts     10 parts of 7 rows on 1 rank" in printed
    assert re.search(r"written   70 rows, [\d.]+ s, [\d,]+ rows/s: \S+p\.h5\n$", printed)


@pytest.mark.parametrize(("ranks", "part_rows"), [(3, 7), (4, 30), (2, 70)])
def test_every_number_of_ranks_writes_the_same_file(
    ranks: int, part_rows: int, trained: Path, tmp_path: Path
) -> None:
    """Of 4 ranks one has no part, and of 2 as well."""
    given = options(trained, tmp_path, id="id", part_rows=part_rows)
    solo(given)
    other = replace(given, out=str(tmp_path / "several.h5"))
    on_ranks(ranks, lambda comm: predict(other, comm))
    assert Path(other.out).read_bytes() == Path(given.out).read_bytes()


class Counting(Same):
    """Counts the rows that it predicts on, and fails in the batch with row `fails_at`."""

    rows: list[float]
    fails_at = -1.0

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        numbers = batch["inputs"][:, 0].tolist()
        if self.fails_at in numbers:
            raise RuntimeError("out of luck")
        self.rows = [*getattr(self, "rows", []), *numbers]
        return {**super().predict(model, batch), "row": batch["inputs"][:, 0].double()}


def failed(given: Options, fails_at: float) -> list[Path]:
    """A job that fails at a row; its parts."""
    task = Counting()
    task.fails_at = fails_at
    with pytest.raises(TaskError, match=r"cannot predict rows 4\d to \d+:(.|\n)*out of luck"):
        predict(given, SoloCommunicator(), task)
    assert not Path(given.out).exists()
    return sorted(Path(f"{given.out}.parts").glob("part-*"))


def test_a_second_start_makes_what_is_missing_or_damaged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(trained, tmp_path, id="id")
    whole = solo(replace(given, out=str(tmp_path / "whole.h5")), Counting())
    parts = failed(given, 47)
    assert len(parts) == 6  # of 7 rows each: rows 42 to 48 are not there
    foreign = failed(replace(given, batch_size=5), 47)
    assert {path.name for path in foreign} > {path.name for path in parts}
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    content = bytearray(parts[2].read_bytes())
    content[-9] ^= 1
    parts[2].write_bytes(content)
    shutil.copy(parts[4], parts[3])
    parts[4].write_bytes(parts[4].read_bytes().replace(b'"nan_rows": 0', b'"nan_rows": 1'))
    capsys.readouterr()
    task = Counting()
    found = solo(given, task)
    said = capsys.readouterr()
    assert "goes on   1 of 10 parts were found there" in said.out
    assert "has 6 parts of other predictions" in said.err
    missing = [row for row in range(70) if not 35 <= row < 42]
    assert task.rows == [0, 1, *missing]  # the first rows show what the task gives
    assert list(found) == list(whole)
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values)
    assert not Path(f"{given.out}.parts").exists()


def test_another_number_of_ranks_goes_on(trained: Path, tmp_path: Path) -> None:
    given = options(trained, tmp_path)
    whole = solo(replace(given, out=str(tmp_path / "whole.h5")), Counting())
    failed(given, 47)
    tasks = [Counting() for _ in range(3)]
    on_ranks(3, lambda comm: predict(given, comm, tasks[comm.rank]))
    assert sorted(row for task in tasks for row in task.rows[2:]) == list(range(42, 70))
    np.testing.assert_array_equal(datasets(Path(given.out))["row"], whole["row"])


@pytest.mark.parametrize("change", ["model", "data", "task", "part_rows", "id"])
def test_parts_of_other_predictions_are_not_taken(
    change: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(trained, tmp_path)
    failed(given, 47)
    task: Task = Counting()
    if change == "model":
        (tmp_path / "other").mkdir()
        train(replace(small(tmp_path / "other"), seed=1), 1)
        given = replace(given, run=str(tmp_path / "other" / "runs" / "r"))
    elif change == "data":
        write_shards(tmp_path)
    elif change == "task":
        task = Same()
    else:
        given = replace(given, **{change: {"part_rows": 8, "id": "id"}[change]})
    solo(given, task)
    said = capsys.readouterr()
    assert "goes on" not in said.out
    assert "of other predictions" in said.err


def best_of(run: Path) -> str:
    return (run / "checkpoints" / "best").read_text().strip()


def test_a_file_that_exists_is_not_overwritten(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.h5"
    out.write_text("mine")
    assert main(["predict", str(trained), "--data", write_shards(tmp_path), "--out", str(out)]) == 2
    assert f"{out} exists already; expected a new file, as none is overwritten" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert not Path(f"{out}.parts").exists()
    assert main(["predict", str(trained), "--data", "x", "--out", str(tmp_path / "no" / "p.h5")]) == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err


def test_a_second_job_for_the_same_file_is_refused(trained: Path, tmp_path: Path) -> None:
    given = options(trained, tmp_path)
    folder = Path(f"{given.out}.parts")
    folder.mkdir()
    with take(folder), pytest.raises(SetupFailed, match=rf"p\.h5\.parts is in use by process {os.getpid()}"):
        solo(given)
    assert len(solo(given)["class"]) == sum(ROWS)
    assert not folder.exists()


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
    found = solo(options(trained, tmp_path), Odd())
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
        assert read.schema.metadata[b"checkpoint"] == best_of(trained).encode()
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


class Nan(Same):
    """Row 33 and row 60 are not numbers; infinity is one."""

    fails = False

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch["inputs"].clone()
        if self.fails and 65 in x[:, 0].tolist():
            raise RuntimeError("later")
        x[(x[:, 0] == 33) | (x[:, 0] == 60), 1] = float("nan")
        x[x[:, 0] == 2] = float("inf")
        return {"x": x}


def test_predictions_that_are_no_numbers_are_counted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of parts that were found as well."""
    given, task = options(trained, tmp_path), Nan()
    task.fails = True
    with pytest.raises(TaskError, match="later"):
        solo(given, task)
    solo(given, Nan())
    said = capsys.readouterr()
    assert "goes on   9 of 10 parts" in said.out
    assert (
        f"2 of 70 rows have predictions that are not a number; the first is row 33 of {given.out}, "
        f"row 27 of {tmp_path / 'part2.h5'}." in said.err
    )


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


def test_a_full_disk_loses_no_part(trained: Path, tmp_path: Path) -> None:
    """No file may grow as large as the whole one is."""
    given = options(trained, tmp_path, "p.csv", id="id")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(UserError, match=r"p\.csv: .*make room, and start the same command again"):
            solo(given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(list(Path(f"{given.out}.parts").glob("part-*"))) == 10
    assert not Path(given.out).exists()
    predict(given, SoloCommunicator())
    assert len(Path(given.out).read_text().splitlines()) == 1 + sum(ROWS)
