"""A rank that is killed ends the job, wherever the others wait for it; the last checkpoint stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.deadlines import seconds
from tests.launching import assert_nothing_is_left, command, ranks_of, start
from tests.mpi.jobs import events, model_bytes
from tests.mpi.test_resume import LONG, wait_for_rounds


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("mpirun", "mpi"), ("mpirun", "ring"), ("horovodrun-gloo", "ring"), ("horovodrun-gloo", "horovod")],
)
def test_a_killed_rank_ends_the_job_within_ten_seconds(launcher: str, backend: str, tmp_path: Path) -> None:
    options = ["--runs", str(tmp_path), "--name", "r", "--backend", backend, "--checkpoint.every-rounds", "2"]
    with start(command(launcher, 2, ["-m", "hvd_train", *options, *LONG])) as process:
        wait_for_rounds(tmp_path / "r", 5, process)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        os.kill(ranks[-1], signal.SIGKILL)
        killed_at = time.monotonic()
        stdout, stderr = process.communicate(timeout=seconds(30))
        assert time.monotonic() - killed_at < seconds(10), stdout + stderr
        assert process.returncode != 0
        assert_nothing_is_left(process, 5)
    assert events(tmp_path / "r", "stop") == []
    assert model_bytes(tmp_path / "r")
