"""`hvd_train status` of a real job: while it runs, with a slow rank, and after it was killed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tests.deadlines import seconds
from tests.launching import ROOT, command, ranks_of, run, send, start, wait_for
from tests.markdown import blocks
from tests.mpi.jobs import events
from tests.mpi.test_resume import DIGITS, TASKS, wait_for_rounds

STATUS = [sys.executable, "-m", "hvd_train", "status"]
LONG = (*DIGITS, "--task", f"{TASKS}:Straggling", "--patience", "0", "--max-rounds", "4000")


def status(path: Path) -> list[str]:
    job = run([*STATUS, str(path)], deadline_s=60)
    assert job.returncode == 0, job.output
    return job.stdout.splitlines()


def test_a_running_job_its_slow_rank_and_a_crash(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    options = ["--runs", str(tmp_path), "--name", "r", "--evaluate.every-rounds", "2"]
    with start(command("mpirun", 4, ["-m", "hvd_train", *options, *LONG])) as process:
        wait_for_rounds(folder, 6, process)
        wait_for(lambda: bool(events(folder, "machine") and events(folder, "evaluation")), 60, process)
        (line,) = [line for line in status(tmp_path) if line.startswith("r ")]
        assert line.split()[1] == "running"
        assert line.split()[-2:] == ["4", "1"]
        lines = {line[:10].strip(): line[10:] for line in status(folder)}
        (shown,) = [b for b in blocks(ROOT / "docs/monitoring.md") if b.language == "text"]
        assert [label for label in lines if label != "layer"] == [
            line[:10].strip() for line in shown.text.splitlines()
        ]
        assert lines["run"].startswith(f"{folder}: running, process ")
        assert lines["slow"].startswith("rank 2 on ")
        assert "in local steps" in lines["slow"]
        assert "rounds to the limit" in lines["stops at"]
        send(ranks_of(process), signal.SIGKILL)
        process.communicate(timeout=seconds(60))
        assert status(folder)[0].startswith(f"run       {folder}: crashed, process ")
        assert status(folder)[0].endswith(" was killed")
