"""The results: a file with one JSON object a line, one for each training that has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.problems import Training


@dataclass(frozen=True)
class Result:
    """A line of the file."""

    values: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """Learning rate."""
        return float(self.values["lr"])

    @property
    def error(self) -> float:
        """In the unit of the problem; infinity if the training diverged."""
        error = self.values["error"]
        return float("inf") if error is None else float(error)

    def is_of(self, training: Training) -> bool:
        """Whether it is that of a training, with all its settings."""
        return all(self.values.get(name) == value for name, value in _plain(training.key()).items())


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are when they have been written and read: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def read_results(path: Path) -> list[Result]:
    """What the file has so far, the last line left out if it is not complete."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Result(json.loads(line)) for line in lines if line.endswith("\n")]


def append_result(path: Path, values: Mapping[str, Any]) -> Result:
    """Adds a line, which is on disk when this returns. An incomplete line at the end is replaced."""
    line = json.dumps(values) + "\n"
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    return Result(json.loads(line))


def find(results: Sequence[Result], training: Training) -> Result | None:
    """The result of a training; None if it has not ended."""
    return next((result for result in results if result.is_of(training)), None)
