"""The processes that this one started, and those that they started, as /proc shows them (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int, number: signal.Signals) -> None:
    """Has the kernel send this process a signal when `parent`, its parent, ends. If that has ended already,
    so does this process."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def descendants() -> list[int]:
    """All living descendants of this process, parents before their children."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # The name, in parentheses, may hold blanks and parentheses itself.
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(folder.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def command(pid: int) -> list[str]:
    """The program that a process runs and its arguments; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def name(pid: int) -> str:
    """The name of the program that a process runs, without its folder; empty if it is gone."""
    return Path("".join(command(pid)[:1])).name


def description(pid: int) -> str:
    """The program that a process runs, an ssh with its host; empty if it is gone."""
    words = command(pid)
    if not words:
        return ""
    program = Path(words[0]).name
    if program == "ssh":
        hosts = [word for before, word in itertools.pairwise(words) if not _is_option(before, word)]
        return " ".join([program, *hosts[:1]])
    return program


def _is_option(before: str, word: str) -> bool:
    """Whether a word of ssh's is an option or the value of one."""
    return word.startswith("-") or bool(re.fullmatch("-[bcDEeFIiJLlmOopQRSWw]", before))


def send(pid: int, number: signal.Signals) -> None:
    """A signal; to a process that has ended nothing."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def send_all(number: signal.Signals, spare: str = "") -> None:
    """A signal to every descendant, except those whose command contains `spare`."""
    for pid in descendants():
        if not (spare and any(spare in word for word in command(pid))):
            send(pid, number)


def reap() -> dict[int, int]:
    """Takes the status of every child that has ended: `{pid: wait status}`."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended
