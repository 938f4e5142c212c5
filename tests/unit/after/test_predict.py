"""Predictions in one file: the order of rows, and what a second start takes and makes anew."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvd_train
from hvd_train.after.predict.job import open_job
from hvd_train.after.predict.options import Options
from hvd_train.after.predict.run import predict
from hvd_train.after.trained import open_trained
from hvd_train.cli import main
from hvd_train.comm.agree import SetupFailed
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.errors import TaskError, UserError
from hvd_train.run.claim import take
from hvd_train.tasks.base import Batch, Task
from tests.threads import on_ranks
from tests.unit.after.predictions import ROWS, datasets, options, solo, write_shards
from tests.unit.data.shards import inputs_of
from tests.unit.trainings import Same, small, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small classification of 7 classes."""
    folder = tmp_path_factory.mktemp("trained")
    train(small(folder), 1)
    return folder / "runs" / "r"


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
    saved = open_trained(trained).saved
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


def test_a_file_that_was_complete_at_a_kill_gets_its_name(trained: Path, tmp_path: Path) -> None:
    """The job was killed while it removed the parts."""
    given = options(trained, tmp_path)
    expected = solo(given, Counting())
    parts = open_job(replace(given, out=str(tmp_path / "other.h5")), SoloCommunicator(), Counting()).parts
    whole = replace(parts, out=Path(given.out)).whole
    whole.parent.mkdir()
    os.rename(given.out, whole)
    task = Counting()
    found = solo(given, task)
    assert task.rows == [0, 1]  # which show what the task gives
    assert list(found) == list(expected)
    np.testing.assert_array_equal(found["row"], np.arange(sum(ROWS)))
    assert not whole.parent.exists()


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
