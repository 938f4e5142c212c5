"""How many lines of each kind the event log takes: it stays small for any number of rounds and ranks."""

from __future__ import annotations

from typing import final


@final
class Budget:
    """A number of bytes that may be written at once, refilled at a constant rate (a token bucket).

    Args:
        bytes_per_s: the rate in the long run.
        burst_bytes: what may be written at once, at the start or after a pause.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float) -> None:
        self._rate = bytes_per_s
        self._burst = burst_bytes
        self._left = burst_bytes
        self._seen: float | None = None

    def allows(self, now: float) -> bool:
        """Whether a line may be written at `now`, in seconds of any clock. One that was set back refills
        nothing."""
        if self._seen is not None:
            self._left = min(self._burst, self._left + self._rate * max(0.0, now - self._seen))
        self._seen = now
        return self._left > 0

    def spend(self, num_bytes: int) -> None:
        """Takes the bytes of a line that was written. What is left may be negative: it is paid back first."""
        self._left -= num_bytes
