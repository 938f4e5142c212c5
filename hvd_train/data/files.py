"""Opening files without waiting for them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hvd_train.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def require_regular(path: str | Path, expected: str) -> None:
    """Raises `DataError` for anything but a regular file; `expected` names what should be there.

    Opening a pipe waits for its other end, which may never come. Raises OSError where nothing is at `path`.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise DataError(f"{path}: is {kind}. Expected {expected}: name a regular file.")
