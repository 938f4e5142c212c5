"""A real pseudo-terminal, and what a program prints on it."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.deadlines import seconds


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, list[bytes]]]:
    """The program's end as a descriptor, which the block closes, and what arrives at the other end, which is
    complete after the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                seen.append(data)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux gives once the other end is closed
                raise

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, seen
    finally:
        reader.join(timeout=seconds(30))
        assert not reader.is_alive()
        os.close(ours)
