"""A training on a file that a program writes on meanwhile, on several ranks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.mpi.jobs import events, train
from tests.unit.data.swmr import Writer

pytestmark = pytest.mark.mpi


def test_every_rank_has_the_same_rows_of_a_file_that_grows(tmp_path: Path) -> None:
    path, done = tmp_path / "a.h5", threading.Event()
    with Writer(path) as writer:
        writer.add(500)

        def go_on() -> None:
            while not done.wait(0.02):
                writer.add(1)

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            job = train(
                "mpirun",
                2,
                tmp_path,
                *("--data", str(path), "--data.reading", "stream", "--data.validation", "0.2"),
                *("--max-rounds", "30", "--patience", "0", "--name", "live"),
                deadline_s=240,
            )
        finally:
            done.set()
            thread.join()
    assert job.stderr.count("a program is writing it (SWMR). The run uses the ") == 1
    (header,) = events(tmp_path / "live", "header")
    rows = sum(header["samples_per_rank"]) + header["validation_samples"]
    assert f"The run uses the {rows:,} rows that it had when the run began" in job.stderr
    assert rows > 500
    (stop,) = events(tmp_path / "live", "stop")
    assert (stop["reason"], stop["round"]) == ("max_rounds", 30)
