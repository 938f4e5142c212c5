"""Files of a run that are read whoever made them: no link is followed, no pipe or device waited for."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def open_regular(path: str | Path) -> io.FileIO:
    """Opens a regular file to read its bytes, unbuffered. Raises OSError; one that says so for a symbolic
    link, and for what is no regular file."""
    try:
        file = io.FileIO(path, opener=_open)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
