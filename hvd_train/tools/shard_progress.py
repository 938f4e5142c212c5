"""How far `shard write` is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, final

from hvd_train.io.output import warn

if TYPE_CHECKING:
    from hvd_train.data.progress import Step

_LINE_S = 30.0
_DRAW_S = 0.1
_MIB = 1 << 20


@final
class WriteProgress:
    """On standard error, from the first report on."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (_DRAW_S if self._is_terminal else _LINE_S)
        self._doing = ""

    def __enter__(self) -> WriteProgress:
        if self._is_terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
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

    def report(self, step: Step) -> None:
        """So much of a step is done."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_DRAW_S if self._is_terminal else _LINE_S)
        if not self._is_terminal:
            warn(f"{text(step)} ({100 * step.done // max(1, step.of)} %)")
            return
        if step.doing != self._doing:  # its speed is another
            self._doing = step.doing
            self._progress.reset(self._bar)
        self._progress.update(
            self._bar, description=text(step), completed=step.done, total=step.of, refresh=True
        )


def text(step: Step) -> str:
    """A step in words."""
    size = _MIB if step.unit == "bytes" else 1
    unit = "MiB" if step.unit == "bytes" else step.unit
    return f"{step.done // size:,} of {step.of // size:,} {unit} {step.doing}"
