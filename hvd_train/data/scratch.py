"""Where what writes shards keeps its temporary files: in a folder of its own in the folder of the shards,
held by a lock, so that what a killed program left is known as such and removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, final

from hvd_train.errors import DataError
from hvd_train.io.held_folder import HeldFolder, is_held, remove_abandoned
from hvd_train.io.output import warn

Kind = Literal["alone", "beside"]
"""Whether a program must be the only one that writes a part, or may do so beside others of its kind."""

_HOST = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:60]
_NAME = re.compile(r"\.writing-(?P<host>[^,]+),(?P<parts>[^,]+),(?P<kind>[^,]+),.*")


@final
class Scratch:
    """A new folder at `path`, with which `folder` is made if it is not there. What programs left there that
    were killed is removed.

    Locks of another host may not be seen here: its folders stay, with a warning.

    Args:
        parts: that are written.

    Raises `DataError` if another program writes one of them, unless both are `beside`, and OSError.
    """

    def __init__(self, folder: Path, parts: Sequence[str], kind: Kind) -> None:
        self._folder = folder
        self._is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):  # of two that begin at once, the second one sees the first
                _remove_abandoned(folder)
                self._refuse_others(parts, kind)
                self._make(f".writing-{_HOST},{'+'.join(parts)},{kind},")
        except BaseException:
            self._remove_new()
            raise

    def close(self) -> None:
        """Removes the folder with all that is in it, and `folder` if it was new and is empty. May be called
        twice."""
        if self._held is not None:
            self._held.close()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._remove_new()

    def _make(self, prefix: str) -> None:
        self._held: HeldFolder | None = None
        try:
            self._held = HeldFolder.make(self._folder, prefix)
            self.path = self._held.path
        except OSError:  # a file system without locks: nothing is known of other programs
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self._folder))

    def _refuse_others(self, parts: Sequence[str], kind: Kind) -> None:
        for path in self._folder.glob(".writing-*"):
            other = _NAME.fullmatch(path.name)
            if other is None:
                continue
            both = [part for part in parts if part in other["parts"].split("+")]
            if is_held(path) and both and "alone" in (kind, other["kind"]):
                raise DataError(
                    f"{path}: another program is writing the {both[0]} part, on {other['host']}. Wait until "
                    "it has ended, or give another folder."
                )
            if other["host"] != _HOST and not is_held(path):
                warn(
                    f"{path}: temporary files of a program on {other['host']}. Delete them if it is not "
                    "running any more."
                )

    def _remove_new(self) -> None:
        if self._is_new:
            with contextlib.suppress(OSError):
                self._folder.rmdir()


def tidy(folder: Path) -> None:
    """Removes what programs left in `folder` that were killed. Raises OSError."""
    if folder.is_dir():
        with locked(folder):
            _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    remove_abandoned(folder, f".writing-{_HOST},")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other programs out of the manifest in an existing folder, where its file system has locks.
    Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
