"""Reading a log of lines that another process, perhaps on another host, is still writing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from hvd_train.io.regular import open_regular

MAX_LINE_BYTES = 16 << 20
"""No event is as long: a header of 100,000 ranks has 3 MB."""

_BLOCK_BYTES = 1 << 20
_LATE_S = 60.0
"""How long a line with zeros is waited for: on a shared file system a file may grow before its bytes
arrive."""


@final
class Follower:
    """Gives the lines of a file that were written since the last time.

    A last line that is not complete is left for the next time. A line that is too long is skipped.

    Args:
        path: may appear, shrink, be replaced and vanish.
        clock: seconds.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._in_long_line = False
        self._late: tuple[int, float] | None = None
        self.number = 0
        """Of the last line that was given, or skipped."""
        self.restarted = False
        """Whether the last `lines` began again at the first line, as the file was replaced or cut."""
        self.skipped: list[int] = []
        """Numbers of the lines that were too long."""

    @property
    def is_waiting(self) -> bool:
        """Whether the next line has not arrived as a whole, although there are lines behind it."""
        return self._late is not None and self._late[0] == self._offset

    def lines(self) -> Iterator[bytes]:
        """The complete lines that are new, without their ends. Raises OSError."""
        self.restarted = False
        with open_regular(self._path) as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._file is not None and (identity != self._file or status.st_size < self._offset):
                self._begin_again()
            self._file = identity
            yield from self._new_lines(file.fileno())

    def _begin_again(self) -> None:
        self._offset = self.number = 0
        self._in_long_line, self._late = False, None
        self.skipped = []
        self.restarted = True

    def _new_lines(self, descriptor: int) -> Iterator[bytes]:
        rest = b""
        while block := os.pread(descriptor, _BLOCK_BYTES, self._offset + len(rest)):
            *complete, rest = (rest + block).split(b"\n")
            for line in complete:
                if self._is_late(line):
                    return
                self._offset += len(line) + 1
                self.number += 1
                if self._in_long_line:
                    self._in_long_line = False
                    self.skipped.append(self.number)
                else:
                    yield line
            if len(rest) > MAX_LINE_BYTES or self._in_long_line:
                self._in_long_line = bool(rest) or self._in_long_line
                self._offset += len(rest)
                rest = b""

    def _is_late(self, line: bytes) -> bool:
        """Whether bytes of this line have not arrived yet. After a while it counts as damaged."""
        if b"\0" not in line:
            return False
        now = self._clock()
        if self._late is None or self._late[0] != self._offset:
            self._late = (self._offset, now)
        return now - self._late[1] < _LATE_S
