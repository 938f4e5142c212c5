"""A signal that some damaged files cause, mostly in the HDF5 library, ends with the name of the file.

HDF5 is C code that reads what a file says into memory; a damaged file can make it fail in a way that no
exception reports.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from hvd_train.errors import DataError

T = TypeVar("T")

_FRAME = "the HDF5 library reads this file"
MAPPED = "this file is mapped into memory: it was cut short, or its file system failed"


def _call(action: Callable[..., T], *args: Any) -> T:
    return action(*args)


def naming(path: str | Path, frame: str = _FRAME) -> Callable[..., Any]:
    """A function `f(action, *args)` that calls `action(*args)`; should the process die of a signal meanwhile,
    in any thread, `path` is in the stack that Python's faulthandler prints on stderr.

    Turns that handler on if it is off. It prints names of functions and of source files only, so the frame
    of `f` has the path as its source file, and `frame`, what is done with the file, as its name: nothing is
    written or stored per call.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # sys.stderr may be no file, as in notebooks
    # In < >, so that a traceback does not open the shard to look for a line of source code.
    names = {"co_filename": f"<{path}>", "co_name": frame}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = frame
    code = _call.__code__.replace(**names)  # type: ignore[arg-type]
    return FunctionType(code, _call.__globals__)


def in_child(path: str | Path, action: Callable[[], T]) -> T:
    """`action()` in a process of its own, forked from this one; what it returns must be picklable.

    Raises what `action` raises if that is a `DataError`, and `DataError` if the process dies of a signal.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(theirs, action))
    child.start()
    theirs.close()
    try:
        outcome = ours.recv()
    except EOFError:
        outcome = None
    finally:
        ours.close()
        child.join()
    if isinstance(outcome, DataError):
        raise outcome
    if outcome is None:
        raise DataError(f"{path}: {_end(child.exitcode)} while it read this file. {_CRASHED}")
    return cast(T, outcome[0])


_CRASHED = "The file is damaged in a way that the HDF5 library does not notice: copy or write it again."


def _end(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the process died of {signal.Signals(-exitcode).name}"
    return f"the process ended with exit code {exitcode}"


def _serve(results: Connection, action: Callable[[], Any]) -> None:
    faulthandler.enable(file=os.open(os.devnull, os.O_WRONLY))  # the parent names the file, in one line
    try:
        results.send((action(),))
    except DataError as error:
        results.send(error)
