"""The results: a file with one JSON object a line, one for each training that has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.problems import KEY, Training


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


class Results:
    """Those of a file, which need not exist yet. An incomplete last line does not count.

    A training has a result if one has the same key, with all settings: what has been changed since is
    trained again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key: dict[str, Result] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                self._take(json.loads(line))

    def _take(self, values: Mapping[str, Any]) -> None:
        self._by_key[_text({name: values[name] for name in KEY})] = Result(values)

    def find(self, training: Training) -> Result | None:
        """The result of a training; None if it has not ended."""
        return self._by_key.get(_text(training.key()))

    def append(self, values: Mapping[str, Any]) -> None:
        """Adds a line, which is on disk when this returns. An incomplete one at the end is replaced."""
        line = json.dumps(values) + "\n"
        with self._path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._take(json.loads(line))


def _text(key: Mapping[str, Any]) -> str:
    """The same for a key that was written and read: JSON has no tuples."""
    return json.dumps(key, sort_keys=True)
