"""`predict` as a user starts it: any number of ranks, and jobs that are killed and started again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import h5py
import pytest

import hvd_train
from hvd_train.cli import main
from hvd_train.config import Config, DataConfig, StopConfig
from tests.deadlines import seconds
from tests.launching import command, ranks_of, run, send, start, wait_for

PARTS = 36
"""Of 10 rows, of the 359 rows of validation data."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        name="r",
        runs=str(tmp_path_factory.mktemp("runs")),
        task="tests/mpi/predicting.py:Unhurried",
        backend="solo",
        threads=1,
        data=DataConfig(path="digits"),
        stop=StopConfig(patience=0, max_rounds=2),
    )
    return hvd_train.train(config).run


def options(trained: Path, out: Path) -> list[str]:
    plain = ["--id", "targets", "--part-rows", "10", "--batch-size", "5", "--threads", "1"]
    return [str(trained), "--data", "digits", "--out", str(out), *plain]


def line(ranks: int, trained: Path, out: Path) -> list[str]:
    return command("mpirun", ranks, ["-m", "hvd_train", "predict", *options(trained, out)])


def datasets(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file}


def count(folder: Path) -> int:
    """The parts that are there."""
    return len(list(folder.glob("part-*"))) if folder.exists() else 0


def test_predictions_survive_kills_and_do_not_depend_on_the_ranks(trained: Path, tmp_path: Path) -> None:
    """One process without a launcher; two ranks that are killed, and three that go on."""
    assert main(["predict", *options(trained, tmp_path / "whole.h5")]) == 0
    expected = datasets(tmp_path / "whole.h5")
    assert list(expected) == ["class", "probability", "targets"]
    out, rng, found = tmp_path / "killed.h5", random.Random(14), 0
    folder = Path(f"{out}.parts")
    for _ in range(2):
        each = rng.randrange(3, 9)  # parts that a rank makes at most; in two starts less than all
        limit = {"PREDICTED_BATCHES": str(2 * each)}
        with start(line(2, trained, out), env=limit) as process:
            until = found + rng.randrange(1, each)  # a first batch is predicted to see its shapes
            wait_for(lambda until=until: count(folder) >= until, 60, process)  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)
            send(ranks_of(process), signal.SIGKILL)
            stdout, _ = process.communicate(timeout=seconds(30))
        if found:
            assert f"goes on   {found} of {PARTS} parts were found there" in stdout
        found = count(folder)
        assert 0 < found < PARTS
        assert not out.exists()
    job = run(line(3, trained, out), deadline_s=60)
    assert job.returncode == 0, job.output
    assert f"{PARTS} parts of 10 rows on 3 ranks" in job.stdout
    assert f"goes on   {found} of {PARTS} parts were found there" in job.stdout
    assert datasets(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.h5", "whole.h5"]
