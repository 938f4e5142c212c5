"""A folder for files that do not outlive the processes that use it.

Every process that uses it holds a shared lock on a file in it, which the kernel releases when the process
ends, however it ends. The last one to close the folder removes it; what is left of processes that were
killed, the next ones remove.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import final

_OWNERS = "owners"

_UNOWNED_S = 600.0
"""Age from which a folder without owners is one that a process could not complete."""

_ATTEMPTS = 10


@final
class HeldFolder:
    """A folder, while this process uses it."""

    def __init__(self, path: Path, owners: int) -> None:
        self.path = path
        self._owners: int | None = owners

    @classmethod
    def make(cls, parent: Path, prefix: str) -> HeldFolder:
        """A new folder in `parent`, which is made if it is not there. Raises OSError."""
        for _ in range(_ATTEMPTS):
            parent.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            os.close(os.open(path / _OWNERS, os.O_CREAT | os.O_RDWR, 0o600))
            try:
                return cls.hold(path)
            except (FileNotFoundError, BlockingIOError):  # taken for abandoned just now
                continue
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
        raise OSError(f"another process removed each of {_ATTEMPTS} folders")

    @classmethod
    def hold(cls, path: Path) -> HeldFolder:
        """The folder that another process has made and holds. Raises OSError."""
        owners = os.open(path / _OWNERS, os.O_RDWR)
        try:
            fcntl.flock(owners, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.stat(path / _OWNERS).st_ino != os.fstat(owners).st_ino:
                raise FileNotFoundError(f"{path} was removed")
        except BaseException:
            os.close(owners)
            raise
        return cls(path, owners)

    def close(self) -> None:
        """Removes the folder, unless other processes hold it. May be called twice."""
        if self._owners is None:
            return
        owners, self._owners = self._owners, None
        _remove_if_free(self.path, owners)


def is_held(path: Path) -> bool:
    """Whether a process holds the folder, as far as locks show it."""
    try:
        owners = os.open(path / _OWNERS, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(owners, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(owners)
    return False


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders that no process holds any more."""
    for path in parent.glob(f"{prefix}*"):
        try:
            owners = os.open(path / _OWNERS, os.O_RDWR)
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _UNOWNED_S:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError:  # of another user
            continue
        else:
            _remove_if_free(path, owners)


def _remove_if_free(path: Path, owners: int) -> None:
    """`owners`: its open file of locks; closed."""
    try:
        fcntl.flock(owners, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process
        return
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(owners)
