"""Ranks of a job write one data set at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_train.data.manifest import load_manifest
from tests.launching import command, run
from tests.unit.data.test_shard_streaming import numbers

pytestmark = pytest.mark.mpi

PROGRAM = """
import sys
import numpy as np
import hvd_train

with hvd_train.connect("auto") as comm:
    for part in ("train", "validation"):
        with hvd_train.ShardWriter(sys.argv[1], part=part, rows_per_shard=10, comm=comm) as writer:
            for row in range(comm.rank * 25, comm.rank * 25 + 25):
                writer.append({"inputs": np.full(4, row, "f4"), "targets": row % 7})
"""


def test_each_rank_writes_shards_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "data"
    job = run(command("mpirun", 2, ["-c", PROGRAM, str(out)]), deadline_s=60)
    assert job.returncode == 0, job.output
    assert numbers(out) == numbers(out, "validation") == list(range(50))
    manifest = load_manifest(out)
    assert manifest is not None
    assert [entry.num_samples for entry in manifest.train] == [10, 10, 5, 10, 10, 5]
    assert len(list(out.iterdir())) == 13, "nothing temporary is left"
