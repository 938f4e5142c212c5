"""The last lines of a run, pasted into a shell and into Python, in another folder than it was started in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launching import Job, run
from tests.mpi.jobs import events
from tests.unit.data.shards import write_foreign

TASK = """
import hvd_train
from hvd_train.config import ModelConfig
from hvd_train.tasks.built_in import Classification

class Mine(Classification):
    def __init__(self):
        super().__init__(ModelConfig(hidden=(7,)))
"""

KINDS: Mapping[str, tuple[str, ...]] = {
    "embedded default": (),
    "file": ("--config", "rün.toml"),
    "flags and task": ("--data", "a b.h5", "--task", "my tasks/mine.py:Mine"),
    "pattern, elsewhere": ("--data", "[ab] *.h5", "--data.validation", "0.1", "--runs", "../more runs/$HOME"),
}


def train(folder: Path, *options: str) -> dict[str, str]:
    """A short training in a folder; its last lines by their labels."""
    job = run([sys.executable, "-m", "hvd_train", *options], deadline_s=90, cwd=folder)
    assert job.returncode == 0, job.output
    return {line[:10].strip(): line[10:] for line in job.stdout.splitlines()}


def paste(line: str, folder: Path) -> Job:
    return run(["sh", "-c", line], deadline_s=90, cwd=folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_at_the_end_of_a_run_work_anywhere(kind: str, tmp_path: Path) -> None:
    start, other = tmp_path / 'it\'s "frü"' / "x [1]", tmp_path / "other"
    (start / "my tasks").mkdir(parents=True)
    other.mkdir()
    write_foreign(start / "a b.h5", 40)
    (start / "my tasks" / "mine.py").write_text(TASK)
    if kind == "file":
        write_foreign(start / "c.h5", 30)
        (start / "rün.toml").write_text('[data]\npath = "a b.h5"\nvalidation = "c.h5"\n', encoding="utf-8")
    said = train(start, *KINDS[kind], "--max-rounds", "2", "--patience", "0")
    folder = Path(said["run"])
    assert folder.is_absolute()
    python = shlex.quote(sys.executable)
    again = paste(f"{python} -m hvd_train {said['go on']} --max-rounds 4", other)
    assert again.returncode == 0, again.output
    assert [e["round"] for e in events(folder, "stop")] == [2, 4]
    assert "begins anew" not in again.stderr
    program = f"import hvd_train; print({said['load it']})"
    loaded = run([sys.executable, "-c", program], deadline_s=60, cwd=other)
    assert loaded.returncode == 0, loaded.output
    assert "Linear" in loaded.stdout


def test_a_run_without_averages_suggests_no_resume(tmp_path: Path) -> None:
    said = train(tmp_path, "--sync", "none", "--max-rounds", "2", "--patience", "0")
    assert "go on" not in said
    assert "load it" in said
