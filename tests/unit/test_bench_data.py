"""`bench data`: its options, its report, and that no figure is given for wrong samples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_train.cli import main
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import ConfigError, DataError, EnvironmentMismatch
from hvd_train.tools.bench.command import parse
from hvd_train.tools.bench.data.clock import forget, timed
from hvd_train.tools.bench.data.contestants import Batches, Contestant, in_memory, own
from hvd_train.tools.bench.data.options import Options
from hvd_train.tools.bench.data.right import Right
from hvd_train.tools.bench.data.samples import Samples, load_samples
from hvd_train.tools.bench.data.text import in_words
from tests.launching import run
from tests.unit.data.python_datasets import write_module

ROWS = 130


def bench(*options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "hvd_train",
        "bench",
        "data",
        "--repeat",
        "2",
        "--seconds",
        "0.01",
        *options,
    ]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples(Options(rows=ROWS))


def test_every_way_to_read_is_in_the_report(tmp_path: Path) -> None:
    job = run(bench("--rows", str(ROWS), "--folder", str(tmp_path), "--json"), deadline_s=120)
    assert job.returncode == 0, job.output
    report = json.loads(job.stdout)
    seen = {(row["name"], row["setting"]) for row in report["rows"]}
    assert {
        ("numpy", "in memory"),
        ("numpy", "memmap of .npy"),
        ("hvd_train", "memory, contiguous"),
        ("hvd_train", "mmap, contiguous"),
        ("hvd_train", "stream, contiguous"),
        ("hvd_train", "memory, gzip"),
        ("hvd_train", "stream, gzip"),
        ("h5py", "a batch at a time, contiguous"),
        ("DataLoader", "0 workers, contiguous"),
        ("DataLoader", "2 workers, contiguous"),
        ("DataLoader", "0 workers, gzip"),
    } <= seen
    assert {name for name, _ in seen} | report["left_out"].keys() >= {"WebDataset", "Streaming"}
    plugins = {setting.removeprefix("stream, ") for _, setting in seen} | report["left_out"].keys()
    assert plugins >= {"lz4", "zstd", "blosc"}
    for row in report["rows"]:
        assert 0 < row["warm"]["min"] <= row["warm"]["median"] <= row["warm"]["max"]
        assert row["cold"] is not None or report["not_cold"] or row["setting"] == "in memory"
    by_name = {(row["name"], row["setting"]): row for row in report["rows"]}
    assert by_name["numpy", "in memory"]["times_numpy"] == 1
    assert by_name["DataLoader", "0 workers, contiguous"]["times_loader"] == 1
    assert (report["samples"], report["row_bytes"]) == (ROWS, 785)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_imported_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "webdataset.py").write_text("raise RuntimeError('built for another torch')")
    folders = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    job = run(bench("--rows", "4"), deadline_s=120, env={"PYTHONPATH": folders})
    assert job.returncode == 0, job.output
    assert "WebDataset: left out: cannot be imported: RuntimeError: built for another torch" in job.stdout


def test_samples_of_a_user_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = Arrays(rng.normal(size=(40, 3)).astype("f4"), rng.integers(0, 5, 40))
    write_part(tmp_path / "mine", arrays, shards=2)
    job = run(bench("--data", str(tmp_path / "mine"), "--rows", "30", "--batch-size", "7"), deadline_s=120)
    assert job.returncode == 0, job.output
    assert f"30 samples of 20 bytes, the first 30 samples of {tmp_path / 'mine'}" in job.stdout
    assert "memory, contiguous" in job.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rows", "1"], "--rows = 1: expected at least 2 samples"),
        (["--batch-size", "0"], "--batch-size = 0: expected at least 1 sample"),
        (["--repeat", "0"], "--repeat = 0: expected at least 1 timing"),
        (["--seconds", "0"], "--seconds = 0.0: expected more than 0 seconds"),
    ],
)
def test_invalid_options_are_refused(args: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(["data", *args])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--folder", "nowhere"], "--folder nowhere: expected an existing folder"),
        (["--data", "nowhere.h5"], "nowhere.h5"),
        (
            ["--data", "mine.py:Plain"],
            "--data mine.py:Plain: a Python dataset. Expected shards, which all readers",
        ),
        (["--rows", "1000000000000"], "MiB may be taken, an eighth of the free memory. Give at most --rows"),
    ],
)
def test_an_impossible_measurement_is_one_message(
    args: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path)
    assert main(["bench", "data", *args]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def altered(samples: Samples, change: str) -> Contestant:
    def batches(size: int) -> Batches:
        for inputs, targets in in_memory(samples).batches(size):
            if change == "targets":
                targets = np.roll(targets, 1)
            elif change == "twice":
                inputs[1], targets[1] = inputs[0], targets[0]
            elif change == "values":
                inputs[0, 0, 0] ^= 1
            yield inputs, targets

    return Contestant(name="altered", setting=change, batches=batches)


@pytest.mark.parametrize("change", ["targets", "twice", "values"])
def test_wrong_samples_have_no_figure(samples: Samples, change: str) -> None:
    with pytest.raises(DataError, match=f"altered, {change}: its batches are not made of rows of the data"):
        Right(samples).check(altered(samples, change), 50)


def test_right_samples_are_accepted_also_with_copies(samples: Samples, tmp_path: Path) -> None:
    Right(samples).check(altered(samples, ""), 50)
    inputs, targets = (np.concatenate([a, a]) for a in (samples.inputs, samples.targets))
    copies = Samples(source="", inputs=inputs, targets=targets, scale=1.0)
    write_part(tmp_path, Arrays(inputs, targets))
    Right(copies).check(own(tmp_path, "stream", ""), len(copies))


def test_a_timing_draws_whole_epochs_and_closes_what_it_opened(samples: Samples) -> None:
    drawn: list[int] = []
    closed: list[bool] = []

    def batches(size: int) -> Batches:
        try:
            for inputs, targets in in_memory(samples).batches(size):
                drawn.append(len(targets))
                yield inputs, targets
        finally:
            closed.append(True)

    assert timed(Contestant(name="", setting="", batches=batches), samples, 50, seconds=1e-9) > 0
    assert closed == [True]
    assert set(drawn) <= {50, ROWS % 50}


@pytest.fixture
def in_file_system_of_memory() -> Iterator[Path]:
    path = Path("/dev/shm") / "hvd_train-test-bench-data"
    path.write_bytes(b"x" * 10_000)
    yield path
    path.unlink()


def test_pages_that_stay_in_memory_are_noticed(in_file_system_of_memory: Path) -> None:
    with pytest.raises(EnvironmentMismatch, match="its pages stay in memory"):
        forget([in_file_system_of_memory])


def test_it_is_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "data"]) == 2
    assert "Expected one process: `python -m hvd_train bench data`" in capsys.readouterr().err


def test_the_report_has_a_line_for_each(samples: Samples) -> None:
    spread = {"median": 2000.0, "min": 1000.0, "max": 3000.0}
    slow = dict.fromkeys(spread, 1.0)
    ratios: dict[str, Any] = {"times_numpy": 0.5, "times_loader": 12.34}
    report = {
        "rows": [
            {
                "name": "slow",
                "setting": "a",
                "warm": slow,
                "cold": None,
                **ratios,
            },
            {"name": "fast", "setting": "b", "warm": spread, "cold": spread, **ratios},
        ],
        "left_out": {"WebDataset": "not installed"},
        "not_cold": "",
        "options": {"batch_size": 64},
        "source": "noise",
        "row_bytes": 1000,
        "samples": 60,
        "date": "2026-11-27",
        "versions": {"torch": "2"},
        "machine": {"host": "h", "cores": 2, "cpu": "c", "system": "s", "load_before": 0.0},
    }
    lines = in_words(report).splitlines()
    assert lines[3] == "WebDataset: left out: not installed"
    assert lines[6].split() == ["fast", "b", "2,000", "1,000", "3,000", "2.0", "0.50", "12.3", "2,000", "2.0"]
    assert lines[7].split() == ["slow", "a", "1", "1", "1", "0.0", "0.50", "12.3", "-", "-"]
