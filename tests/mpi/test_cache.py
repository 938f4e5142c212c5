"""A training that reads its shards from copies on its host."""

from __future__ import annotations

import os
from pathlib import Path

from hvd_train.data.local_copy import PREFIX
from hvd_train.io.held_folder import HeldFolder
from tests.mpi.jobs import events, train
from tests.unit.data.shards import write_foreign


def test_two_ranks_share_copies_which_are_gone_afterwards(tmp_path: Path) -> None:
    """Of three shards, the second for both of them, with what a killed job has left."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for i in range(3):
        write_foreign(data / f"s{i}.h5", 200, first=200 * i)
    alive, left = HeldFolder.make(cache, PREFIX), HeldFolder.make(cache, PREFIX)
    (left.path / "00000-s0.h5").write_text("of a killed job")
    assert left._owners is not None
    os.close(left._owners)  # as the kernel does when a process ends
    options = ["--data", str(data), "--data.cache", str(cache), "--data.reading", "mmap", "--threads", "1"]
    train("mpirun", 2, tmp_path, *options, "--name", "a", "--max-rounds", "3", deadline_s=200)
    (header,) = events(tmp_path / "a", "header")
    assert header["reading"] == [f"mmap: as data.reading says; 2 of 2 files copied to {cache}"] * 2
    assert list(cache.iterdir()) == [alive.path]
    alive.close()
