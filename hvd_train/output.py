"""Standard output and error that may be gone: behind a closed pipe, or on a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def warn(message: str) -> None:
    """One line on standard error; if that is gone as well, nothing."""
    with contextlib.suppress(OSError):
        print(f"hvd_train: {message}", file=sys.stderr, flush=True)


def discard(stream: TextIO) -> None:
    """Sends what `stream` still holds, and all that it is given from now on, to nowhere.

    Otherwise Python would try to write the rest at its end, fail, and exit with code 120.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """For commands that only print: ends the program with exit code 1, and without a traceback, if the reader
    of standard output leaves, as `| head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise SystemExit(1) from None
