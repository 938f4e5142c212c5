"""Deadlines that grow with the slowness of the machine, so that a busy one fails no test."""

from __future__ import annotations

import os
import time


class Deadline:
    """A time from now on, longer on a machine that is slow or busy: `seconds` are those of an idle machine
    that takes `_REFERENCE_S` for a small computation."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    def passed(self) -> bool:
        """Whether it is over, by how slow the machine is now."""
        waited = time.monotonic() - self._began
        return waited > self._seconds and waited > self._seconds * slowness()

    def __str__(self) -> str:
        return f"still running after {time.monotonic() - self._began:.0f} s"


_REFERENCE_S = 0.02


def slowness() -> float:
    """How many times slower this machine is now than an idle one, at least 1: by a small computation, and by
    how many processes want a core."""
    began = time.perf_counter()
    sum(i * i for i in range(250_000))
    computed = (time.perf_counter() - began) / _REFERENCE_S
    return max(1.0, computed, os.getloadavg()[0] / (os.cpu_count() or 1))
