"""How far `shard write` is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import final

from hvd_train.io.output import warn

_LINE_S = 30.0
_DRAW_S = 0.1


@final
class WriteProgress:
    """On standard error, from the first report on."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (_DRAW_S if self._is_terminal else _LINE_S)

    def __enter__(self) -> WriteProgress:
        if self._is_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("rows"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._bar = self._progress.add_task("", total=None)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._progress.stop()

    def report(self, rows: int, of: int) -> None:
        """So many rows were read, of so many."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_DRAW_S if self._is_terminal else _LINE_S)
        if self._is_terminal:
            self._progress.update(self._bar, completed=rows, total=of, refresh=True)
        else:
            warn(f"{rows:,} of {of:,} rows read ({100 * rows // max(1, of)} %)")
