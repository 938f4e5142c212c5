"""How a run ended, from its own record."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvd_train.record.events import read_events
from hvd_train.run.layout import CONFIG_FILE, EVENTS_FILE


class Outcome:
    """The events of a run that come after this object was made.

    Args:
        folder: the run's, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = sum(1 for _ in self._events())
        self._configuration = self._file_of_configuration()

    def has_begun(self) -> bool:
        """Whether a training has begun since; its ranks then listen to a request to stop."""
        return any(event.get("event") == "header" for event in self._new())

    def ranks_have_met(self) -> bool:
        """Whether the ranks have connected and opened the data: rank 0 then writes the configuration."""
        return self._file_of_configuration() != self._configuration or self.has_begun()

    def _file_of_configuration(self) -> tuple[int, int]:
        """What differs between two files of one name; zeros where there is none."""
        with contextlib.suppress(OSError):
            os.listdir(self.folder)  # as in `_events`
            found = os.stat(self.folder / CONFIG_FILE)
            return found.st_ino, found.st_mtime_ns
        return 0, 0

    def stop(self) -> dict[str, Any]:
        """The event of its end, as docs/events.md has it; empty if it did not finish."""
        return next((event for event in reversed(list(self._new())) if event.get("event") == "stop"), {})

    def _new(self) -> Iterator[dict[str, Any]]:
        """Those of this start, which begins with a header. What comes before it is of another job, which has
        the folder; the ranks of this one were refused."""
        begun = False
        for event in itertools.islice(self._events(), self._before, None):
            begun = begun or event.get("event") == "header"
            if begun:
                yield event

    def _events(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError):
            # Without it a network file system may keep reporting that the folder does not exist.
            os.listdir(self.folder.parent)
            yield from read_events(self.folder / EVENTS_FILE, skip_damaged=True)
