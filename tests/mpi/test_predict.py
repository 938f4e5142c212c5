"""`predict` as a user starts it: any number of ranks, and jobs that are killed and started again."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import hvd_train
from hvd_train.config import Config, DataConfig, StopConfig
from tests.launching import Job, command, kill, run, start, wait_for

PARTS = 36
"""Of 10 rows, of the 359 rows of validation data."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        name="r",
        runs=str(tmp_path_factory.mktemp("runs")),
        task="tests/mpi/predicting.py:Unhurried",
        backend="solo",
        data=DataConfig(path="digits"),
        stop=StopConfig(patience=0, max_rounds=2),
    )
    return hvd_train.train(config).run


def line(launcher: str, ranks: int, trained: Path, out: Path) -> list[str]:
    options = ["--id", "targets", "--part-rows", "10", "--batch-size", "5", "--threads", "1"]
    program = ["-m", "hvd_train", "predict", str(trained), "--data", "digits", "--out", str(out), *options]
    return command(launcher, ranks, program)


def predicted(launcher: str, ranks: int, trained: Path, out: Path) -> Job:
    job = run(line(launcher, ranks, trained, out), deadline_s=60)
    assert job.returncode == 0, job.output
    return job


def datasets(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file}


def test_predictions_survive_kills_and_do_not_depend_on_the_ranks(trained: Path, tmp_path: Path) -> None:
    whole = tmp_path / "1.h5"
    predicted("python", 1, trained, whole)
    expected = datasets(whole)
    assert list(expected) == ["class", "probability", "targets"]
    for ranks in (2, 3):
        job = predicted("mpirun", ranks, trained, tmp_path / f"{ranks}.h5")
        assert f"{PARTS} parts of 10 rows on {ranks} ranks" in job.output
        assert datasets(tmp_path / f"{ranks}.h5") == expected
    out, rng, found = tmp_path / "killed.h5", random.Random(14), 0
    folder = Path(f"{out}.parts")
    for kills in range(3):
        with start(line("mpirun", 2, trained, out)) as process:
            until = found + rng.randrange(2, 9)
            wait_for(lambda until=until: count(folder) >= until, 60, process)  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)
            kill(process)
            stdout, _ = process.communicate()
        if kills:
            said = re.search(rf"goes on   (\d+) of {PARTS} parts were found there", stdout)
            assert said is not None, stdout
            assert int(said[1]) == found
        found = count(folder)
        assert 0 < found < PARTS
        assert not out.exists()
    assert f"goes on   {found} of {PARTS} parts" in predicted("mpirun", 3, trained, out).output
    assert datasets(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.h5", "2.h5", "3.h5", "killed.h5"]
    with h5py.File(out) as file:
        np.testing.assert_array_equal(file["class"][:], file["probability"][:].argmax(axis=1))


def count(folder: Path) -> int:
    """The parts that are there."""
    return len(list(folder.glob("part-*"))) if folder.exists() else 0
