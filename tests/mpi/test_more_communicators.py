"""The contract of communicators with further numbers of ranks, and with Horovod over MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.test_communicators import MORE_JOBS, keeps_the_contract

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize(("backend", "launcher", "ranks"), MORE_JOBS)
def test_more_jobs_keep_the_contract(backend: str, launcher: str, ranks: int, tmp_path: Path) -> None:
    keeps_the_contract(backend, launcher, ranks, tmp_path)
