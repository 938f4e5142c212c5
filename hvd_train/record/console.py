"""What rank 0 prints: a few lines before, a bar on a terminal or plain lines elsewhere, a few lines after."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO, cast, final

from hvd_train.io.output import discard, warn
from hvd_train.record.reports import (
    EvaluationReport,
    FaultReport,
    PeriodReport,
    Recorder,
    Report,
    RoundReport,
    RunStart,
    StopReport,
)
from hvd_train.record.wording import closing_lines, header_lines, number, period_of

PLAIN_EVERY_S = 10.0
_BAR_EVERY_S = 0.1
_SPEED_OVER_S = 1.0
_BAR_WIDTH = 20


def make_console(stream: TextIO | None = None) -> Recorder:
    """A progress bar where `stream`, by default standard output, is a terminal; plain lines elsewhere."""
    stream = sys.stdout if stream is None else stream
    return BarConsole(stream) if is_terminal(stream) else PlainConsole(stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal with a width. Some MPI launchers give a rank a
    pseudo-terminal without a size, whose other end is a pipe or a file."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _Lasting:
    """A stream that discards all output once it cannot be written: a run continues without its reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        encoding = self.encoding or "utf-8"
        printable = text.encode(encoding, "backslashreplace").decode(encoding)  # any name, in any locale
        with self._outliving():
            self._stream.write(printable)
        return len(text)

    def flush(self) -> None:
        with self._outliving():
            self._stream.flush()

    @contextmanager
    def _outliving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            discard(self._stream)
            warn(f"standard output cannot be written: {error.strerror}. Training goes on without it.")


class _Status:
    """The figures of the running line, from the reports so far."""

    def __init__(self, header: RunStart, clock: Callable[[], float]) -> None:
        self.header = header
        self._clock = clock
        self._start = clock()
        self._last: RoundReport | None = None
        self._evaluation: EvaluationReport | None = None
        self._speed: float | None = None
        self._communication: float | None = None
        self._begin_window()

    def _begin_window(self) -> None:
        self._window_start = self._clock()
        self._samples = 0
        self._seconds: dict[str, float] = {}

    def take(self, report: RoundReport | EvaluationReport) -> None:
        if isinstance(report, EvaluationReport):
            self._evaluation = report
            self._window_start += report.seconds  # the speed is that of training
            return
        self._last = report
        self._samples += report.samples
        for phase, spread in report.seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spread.median

    def measure(self, over_s: float) -> None:
        """Takes speed and share of communication since the last time, if that was `over_s` or more ago."""
        elapsed = self._clock() - self._window_start
        if elapsed <= 0 or (elapsed < over_s and self._speed is not None):
            return
        self._speed = self._samples / elapsed
        total = sum(self._seconds.values())
        waited = self._seconds.get("communication", 0.0) + self._seconds.get("wait", 0.0)
        self._communication = waited / total if total else None
        self._begin_window()

    def line(self) -> str:
        """Round, k where it changes, epoch, error (best), loss, samples/s, share of the time in
        communication; waiting for slower ranks counts as communication."""
        seen, last = self._evaluation, self._last
        rounds, epoch, loss = (last.round, last.epoch, last.loss) if last else (0, 0.0, None)
        error = f"{number(seen.error)} (best {number(seen.best)}{self._ema(seen)})" if seen else "-"
        speed = "-" if self._speed is None else f"{self._speed:,.0f}"
        share = "-" if self._communication is None else f"{self._communication:.0%}"
        period = f"  k {period_of(last):>4}" if last and self.header.schedule else ""
        return (
            f"round {rounds:>6}{period}  epoch {epoch:>7.2f}  {self.header.metric} {error}  "
            f"loss {number(loss)}  {speed:>9} samples/s  communication {share:>4}"
        )

    def _ema(self, seen: EvaluationReport) -> str:
        """The metric of the moving average, where there is one."""
        value = seen.metrics.get(f"ema_{self.header.metric}")
        return "" if value is None else f", ema {number(value)}"

    def done(self) -> float:
        """The part of the run that is done by the limit that is nearest; without a limit, of the epoch."""
        if self._last is None:
            return 0.0
        reached = {
            "max_rounds": float(self._last.round),
            "max_epochs": self._last.epoch,
            "max_seconds": self._clock() - self._start,
        }
        limits = self.header.stop_rules
        parts = [value / limits[name] for name, value in reached.items() if name in limits]
        return min(1.0, max(parts)) if parts else self._last.epoch % 1.0


@final
class PlainConsole(Recorder):
    """One line an evaluation, and one every `PLAIN_EVERY_S` seconds in between.

    Args:
        clock: gives seconds from any beginning.
    """

    _status: _Status

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = _Lasting(stream)
        self._clock = clock
        self._printed = clock()

    def header(self, header: RunStart) -> None:
        self._status = _Status(header, self._clock)
        self._print(*header_lines(header))

    def report(self, report: Report) -> None:
        if isinstance(report, (RoundReport, EvaluationReport)):
            self._status.take(report)
            if isinstance(report, EvaluationReport) or self._clock() - self._printed >= PLAIN_EVERY_S:
                self._status.measure(over_s=0)
                self._print(self._status.line())
        elif isinstance(report, (FaultReport, PeriodReport)):
            self._print(_message(report))
        elif isinstance(report, StopReport):
            self._print(*closing_lines(self._status.header, report))

    def close(self) -> None: ...

    def _print(self, *lines: str) -> None:
        # At once: behind a launcher's pipe the buffer would hold the lines back until the end.
        print(*lines, sep="\n", file=self._stream, flush=True)
        self._printed = self._clock()


@final
class BarConsole(Recorder):
    """A bar that moves, and above it one line an evaluation. `stream` must be a terminal."""

    _status: _Status

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._console = Console(
            file=cast(IO[str], _Lasting(stream)),
            force_terminal=True,
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        one_line = Column(no_wrap=True, overflow="crop")
        # Drawn by `report` alone: a thread that draws would compete with the local steps.
        self._progress = Progress(
            BarColumn(_BAR_WIDTH),
            TextColumn("{task.description}", markup=False, table_column=one_line),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._bar = self._progress.add_task("", total=1.0)
        self._drawn = 0.0

    def header(self, header: RunStart) -> None:
        self._status = _Status(header, time.monotonic)
        self._print(*header_lines(header))
        self._progress.start()

    def report(self, report: Report) -> None:
        if isinstance(report, (RoundReport, EvaluationReport)):
            self._status.take(report)
            if isinstance(report, EvaluationReport):
                self._status.measure(over_s=0)
                self._print(self._status.line())
            self._draw()
        elif isinstance(report, (FaultReport, PeriodReport)):
            self._print(_message(report))
        elif isinstance(report, StopReport):
            self._progress.stop()
            self._print(*closing_lines(self._status.header, report))

    def close(self) -> None:
        self._progress.stop()  # gives the cursor back

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _BAR_EVERY_S:
            self._drawn = now
            self._status.measure(_SPEED_OVER_S)
            self._progress.update(self._bar, completed=self._status.done(), description=self._status.line())
            self._progress.refresh()

    def _print(self, *lines: str) -> None:
        self._console.print(*lines, sep="\n")


def _message(report: FaultReport | PeriodReport) -> str:
    label = "warning" if isinstance(report, FaultReport) else "period"
    return f"{label:<9} round {report.round}: {report.message}"
