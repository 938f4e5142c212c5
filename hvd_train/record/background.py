"""A sink of a run's events, in a thread of its own that never holds the training up."""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol, final

from hvd_train.io.output import warn
from hvd_train.record.reports import Recorder, Report, RunStart

CAPACITY = 10_000
"""Events that wait for a slow sink; more are left out."""
PATIENCE_S = 30.0
"""How long the end of a run waits for a sink to take what is left."""


class Sink(Protocol):
    """Takes the events of a run."""

    def record(self, event: RunStart | Report) -> None:
        """One event, in the order in which they happen: first `RunStart`, last `StopReport` if the run ends
        by itself. Called on rank 0 in one thread, which is not that of the training."""


@final
class Background(Recorder):
    """Hands every event to a sink in a thread. An event that finds the queue full is left out, and one on
    which the sink raises is lost; both are counted, and said.

    Args:
        name: of the sink, for messages.
        sink: may have a method `close` besides, which is called last.
    """

    def __init__(
        self, name: str, sink: Sink, *, capacity: int = CAPACITY, patience_s: float = PATIENCE_S
    ) -> None:
        self._name = name
        self._sink = sink
        self._capacity = capacity
        self._patience_s = patience_s
        self._events: deque[RunStart | Report] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._left_out = 0
        self._failed = 0

    def header(self, header: RunStart) -> None:
        self._put(header)

    def report(self, report: Report) -> None:
        self._put(report)

    def close(self) -> None:
        if self._ending:
            return
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is None:
            self._close_sink()
        else:
            self._thread.join(self._patience_s)
            if self._thread.is_alive():
                warn(
                    f"{self._name} has not taken {len(self._events) + 1} events within {self._patience_s:g} "
                    "s of the end of the run: they are lost."
                )
        if self._left_out:
            warn(f"{self._name} was too slow for {self._left_out:,} events, which are missing there.")
        if self._failed > 1:
            warn(f"{self._name} failed on {self._failed:,} events.")

    def _put(self, event: RunStart | Report) -> None:
        with self._changed:
            if self._ending:
                return
            if len(self._events) >= self._capacity:
                self._left_out += 1
                return
            self._events.append(event)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._ending)
                if not self._events:
                    break
                event = self._events.popleft()
            try:
                self._sink.record(event)
            except BaseException as error:  # SystemExit as well: the training goes on
                self._say_failure(type(event).__name__, error)
        self._close_sink()

    def _close_sink(self) -> None:
        close = getattr(self._sink, "close", None)
        if close is not None:
            try:
                close()
            except BaseException as error:
                self._say_failure("its end", error)

    def _say_failure(self, what: str, error: BaseException) -> None:
        self._failed += 1
        if self._failed == 1:
            warn(f"{self._name} failed on {what}: {type(error).__name__}: {error}. The training goes on.")
