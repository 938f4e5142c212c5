"""What the tests of whole trainings share: how to start one, and what to read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Job, command, run

SHORT = ("--max-rounds", "12", "--patience", "0")
"""A training of the embedded default that takes a moment."""


def train(
    launcher: str,
    ranks: int,
    runs: Path,
    *options: str,
    deadline_s: float = 60,
    env: Mapping[str, str] | None = None,
    succeeds: bool = True,
) -> Job:
    """`python -m hvd_train` under a launcher, to its end."""
    if "horovod" in options and find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: `make setup` builds it")
    program = ["-m", "hvd_train", "--runs", str(runs), *options]
    job = run(command(launcher, ranks, program), deadline_s=deadline_s, env=env)
    assert (job.returncode == 0) is succeeds, job.output
    return job


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    """The events of a run, those of one kind if it is given."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if not kind or e["event"] == kind]


def has_recorded(folder: Path, kind: str, round_: int = 0) -> bool:
    """Whether a run, which may not have begun, has an event of a kind, of this round or a later one."""
    return (folder / "events.jsonl").exists() and any(e["round"] >= round_ for e in events(folder, kind))


def model_bytes(folder: Path, pointer: str = "latest") -> bytes:
    """model.safetensors of a checkpoint."""
    name = (folder / "checkpoints" / pointer).read_text().strip()
    return (folder / "checkpoints" / name / "model.safetensors").read_bytes()
