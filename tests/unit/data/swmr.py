"""A program that writes a file in SWMR mode, and goes on while others read it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from tests.deadlines import seconds

_PROGRAM = """
import sys, h5py, numpy as np
from tests.unit.data.shards import inputs_of
file = h5py.File(sys.argv[1], "w", libver="latest")
inputs = file.create_dataset("inputs", (0, 3), "f4", chunks=(10, 3), maxshape=(None, 3), compression="gzip")
targets = file.create_dataset("targets", (0,), "i8", chunks=(10,), maxshape=(None,))
file.swmr_mode = True
rows = 0
for line in sys.stdin:
    if line == "close\\n":
        file.close()
    else:
        ahead, more = map(int, line.split())
        inputs.resize(rows + more + ahead, 0), targets.resize(rows + more, 0)
        inputs[rows:] = inputs_of(rows, more + ahead)
        targets[rows:] = np.arange(rows, rows + more) % 7
        rows += more
        inputs.flush(), targets.flush()
    print("done", flush=True)
"""


class Writer:
    """Writes rows as `write_foreign` does, on request."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate("", timeout=seconds(60))

    def add(self, rows: int, ahead: int = 0) -> None:
        """Writes so many rows more; of the inputs `ahead` besides, as in the middle of its work."""
        self._do(f"{ahead} {rows}")

    def close(self) -> None:
        """Closes the file; the program goes on."""
        self._do("close")

    def kill(self) -> None:
        """Ends the program without a chance to close the file."""
        self._process.kill()
        self._process.wait(seconds(60))

    def _do(self, request: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
