"""What the suites share, which each rank of a job runs: see test_combinations.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect


@pytest.fixture(scope="session")
def world() -> Iterator[Communicator]:
    with connect(os.environ["COMBINATIONS_BACKEND"]) as comm:
        assert comm.size == int(os.environ["COMBINATIONS_RANKS"])
        yield comm


@pytest.fixture
def runs(world: Communicator, tmp_path: Path) -> str:
    """One folder for all ranks."""
    return str(world.broadcast(tmp_path))
