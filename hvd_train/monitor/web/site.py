"""What the pages show: the runs of one folder, read when they are asked for and kept while they are."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from hvd_train.errors import RunDirectoryError
from hvd_train.monitor.history import History
from hvd_train.monitor.overview import Overview, overview, runs_in
from hvd_train.monitor.state import State, state_by
from hvd_train.run.claim import last_claim
from hvd_train.run.layout import EVENTS_FILE

MOST_COMPARED = 8
_MOST_KEPT = 20
"""Histories that are kept in memory: those of a comparison, and some more."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A run as it is now."""

    name: str
    folder: Path
    history: History
    state: State
    problems: Sequence[str]
    """What could not be read, in one sentence each."""
    version: str
    """Changes with every new event, and with the state."""


@dataclass
class _Kept:
    """A history that is kept."""

    history: History
    number: int
    """How many were kept before it: what is read anew has another version."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    updates: int = 0


@final
class Site:
    """The runs in a folder. Used by several threads.

    Args:
        folder: of the runs. Nothing outside it is read: runs that are symbolic links are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._ended: dict[str, tuple[object, Overview]] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def runs(self) -> tuple[list[Overview], str]:
        """All runs, the newest event first; and why they cannot be listed, if so."""
        try:
            paths = [path for path in runs_in(self.folder) if self._is_inside(path)]
        except OSError as error:
            return [], f"{self.folder}: {error.strerror}"
        found = [self._overview(path) for path in paths]
        self._ended = {path.name: self._ended[path.name] for path in paths if path.name in self._ended}
        return sorted(found, key=lambda run: run.event_s or 0.0, reverse=True), ""

    def _overview(self, path: Path) -> Overview:
        """One line of the list. A run that has ended is read again only when its log or its claim has
        changed."""
        seen = _fingerprint(path)
        before = self._ended.get(path.name)
        if before is not None and before[0] == seen:
            return before[1]
        run = overview(path)
        if run.state.name in ("finished", "interrupted", "diverged"):
            self._ended[path.name] = (seen, run)
        return run

    def path_of(self, name: str) -> Path:
        """The folder of a run. Raises `RunDirectoryError` for a name that is none, or leads elsewhere."""
        path = self.folder / name
        if not name or name in (".", "..") or "/" in name or "\0" in name or not self._is_inside(path):
            raise RunDirectoryError(f"there is no run {name!r} in {self.folder}.")
        return path

    def _is_inside(self, path: Path) -> bool:
        """Whether it is a folder that lies in that of the runs, and not a link."""
        try:
            return path.is_dir() and not path.is_symlink()
        except OSError:
            return False

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Reading]:
        """A run as it is now; no other thread changes it within the block. Raises `RunDirectoryError`."""
        folder = self.path_of(name)
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                kept = self._kept[name] = _Kept(History(folder / EVENTS_FILE), next(self._numbers))
            self._kept.move_to_end(name)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        with kept.lock:
            problem = ""
            try:
                kept.updates += kept.history.update()
            except FileNotFoundError:
                problem = "There is no event log" + (" any more." if kept.history.last else " yet.")
            except OSError as error:
                problem = f"The event log cannot be read: {error.strerror}."
            state = state_by(folder, kept.history)
            problems = [*([problem] if problem else []), *kept.history.problems]
            version = f"{kept.number}-{kept.updates}-{state.name}-{len(problems)}"
            yield Reading(
                name=name,
                folder=folder,
                history=kept.history,
                state=state,
                problems=problems,
                version=version,
            )


def _fingerprint(folder: Path) -> object:
    """Changes when the log or the claim of a run does."""
    try:
        log = os.lstat(folder / EVENTS_FILE)
        claim = last_claim(folder)
    except OSError as error:
        return error.errno
    return log.st_ino, log.st_size, log.st_mtime_ns, claim.changed_ns if claim else None
