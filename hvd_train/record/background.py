"""A sink of a run's events, in a thread of its own that never holds the training up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, final

from hvd_train.errors import ConfigError
from hvd_train.io.output import warn
from hvd_train.liveness import mark
from hvd_train.record.reports import Recorder, Report, RunStart

CAPACITY = 10_000
"""Events that wait for a slow sink; more are left out."""
PATIENCE_S = 30.0
"""How long the end of a run waits for its sinks to take what is left."""
START_S = 120.0
"""How long the start of a run waits for a sink to be made."""
_SLICE_S = 1.0


class Sink(Protocol):
    """Takes the events of a run."""

    def record(self, event: RunStart | Report) -> None:
        """One event, in the order in which they happen: first `RunStart`, last `StopReport` if the run ends
        by itself. Called on rank 0 in one thread, which is not that of the training."""


@final
class Background(Recorder):
    """Makes a sink and hands every event to it, in one thread. An event that finds the queue full is left
    out, and one on which the sink raises is lost; both are counted, and said.

    Args:
        name: of the sink, for messages.
        make: what it raises is raised here. The sink may have a method `close`, which is called last.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Sink],
        *,
        capacity: int = CAPACITY,
        patience_s: float = PATIENCE_S,
        start_s: float = START_S,
    ) -> None:
        self._name = name
        self._capacity = capacity
        self._patience_s = patience_s
        self._events: deque[RunStart | Report] = deque()
        self._changed = threading.Condition()
        self._made = threading.Event()
        self._error: BaseException | None = None
        self._ending = self._closed = False
        self._left_out = 0
        self._failed = 0
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()
        if not _waited(self._made.wait, start_s):
            raise ConfigError(f"{name} was not ready within {start_s:g} s. Correct it, or leave it out.")
        if self._error is not None:
            raise self._error

    def header(self, header: RunStart) -> None:
        self._put(header)

    def report(self, report: Report) -> None:
        self._put(report)

    def close(self) -> None:
        close_all([self])

    def end(self) -> None:
        """Takes no more events. Does not wait."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def finish(self, within_s: float) -> None:
        """Waits until the sink has taken what is left, and is closed; says what was lost."""
        if self._closed:
            return
        self._closed = True
        if not _waited(self._has_ended, within_s):
            warn(
                f"{self._name} has not taken {len(self._events) + 1} events within {self._patience_s:g} s of "
                "the end of the run: they are lost."
            )
        if self._left_out:
            warn(f"{self._name} was too slow for {self._left_out:,} events, which are missing there.")
        if self._failed > 1:
            warn(f"{self._name} failed on {self._failed:,} events.")

    @property
    def patience_s(self) -> float:
        """Seconds that the end of a run waits for it."""
        return self._patience_s

    def _has_ended(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _put(self, event: RunStart | Report) -> None:
        with self._changed:
            if self._ending:
                return
            if len(self._events) >= self._capacity:
                self._left_out += 1
                return
            self._events.append(event)
            self._changed.notify()

    def _work(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
        except BaseException as error:  # SystemExit as well: it would end this thread without a word
            self._error = error
            return
        finally:
            self._made.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._ending)
                if not self._events:
                    break
                event = self._events.popleft()
            try:
                sink.record(event)
            except BaseException as error:  # the training goes on
                self._say_failure(type(event).__name__, error)
        try:
            getattr(sink, "close", lambda: None)()
        except BaseException as error:
            self._say_failure("its end", error)

    def _say_failure(self, what: str, error: BaseException) -> None:
        self._failed += 1
        if self._failed == 1:
            warn(f"{self._name} failed on {what}: {type(error).__name__}: {error}. The training goes on.")


def close_all(sinks: Sequence[Background]) -> None:
    """Ends sinks, which then take what is left side by side."""
    for sink in sinks:
        sink.end()
    began = time.monotonic()
    for sink in sinks:
        sink.finish(max(0.0, sink.patience_s - (time.monotonic() - began)))


def _waited(ready: Callable[[float], bool], limit_s: float) -> bool:
    """Waits until something is ready, and shows meanwhile that this rank is not lost. Whether it is."""
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if ready(min(left, _SLICE_S)):
            return True
        mark()
    return ready(0.0)
