"""Shards that are empty or damaged, seen by two ranks: one message, whichever rank finds it."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from tests.mpi.jobs import train
from tests.unit.data.shards import write_foreign

DEADLINE_S = 200


def test_a_shard_without_samples_is_skipped_with_one_warning(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, rows in enumerate((200, 0, 200)):
        write_foreign(data / f"s{i}.h5", rows)
    options = ["--data", str(data), "--max-rounds", "2", "--threads", "1"]
    job = train("mpirun", 2, tmp_path, *options, deadline_s=DEADLINE_S)
    assert job.output.count("s1.h5: no samples: skipped (1 of 3 shards)") == 1, job.output


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_damaged_rows_end_the_job_with_their_file(tmp_path: Path, reading: str) -> None:
    data = tmp_path / "data"
    inputs = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    write_part(data, Arrays(inputs, np.arange(400) % 3), shards=2)
    path = data / "train-00001-of-00002.h5"
    with h5py.File(path, locking=False) as file:
        at = file["inputs"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[at + 3] ^= 0x40
    path.write_bytes(raw)
    options = ["--data", str(data), "--data.reading", reading, "--max-rounds", "3", "--threads", "1"]
    job = train("mpirun", 2, tmp_path, *options, deadline_s=DEADLINE_S, succeeds=False)
    message = f"{path}: dataset `inputs`, rows 0 to 199: not what was written"
    assert job.output.count(message) == 1, job.output
    assert job.returncode == 2, job.output
