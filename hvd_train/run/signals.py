"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 only set a flag, which the next header carries."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While it is entered, a signal asks for a stop after the round. A second SIGINT ends at once.

    Only a person at a keyboard sends a second SIGINT. SIGTERM and SIGUSR1 may come several times without
    meaning more: Slurm sends SIGTERM to the tasks of a preempted job at the beginning and at the end of its
    grace time, and srun forwards another; a job script forwards what mpirun forwards as well. To end the
    process at once, they send SIGKILL next.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether a stop was asked for."""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
