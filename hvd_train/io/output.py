"""Standard output and error that may fail: a closed pipe, or a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import signal
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


def print_anything() -> None:
    """Lets standard output and error take every text, whatever the locale's encoding: what that lacks, such
    as a file name that is not UTF-8, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def ends_on_interrupt() -> Iterator[None]:
    """For commands that clean up when Ctrl-C ends them: afterwards the process ends by the signal (130 in a
    shell), without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
