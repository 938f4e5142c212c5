"""Deadlines that grow with the slowness of the machine, so that a busy one fails no test."""

from __future__ import annotations

import functools
import os
import time

_REFERENCE_S = 0.02
"""Seconds of the small computation on an idle machine."""


class Deadline:
    """A time from now on; `limit_s` is for an idle machine, and grows with the slowness of this one."""

    def __init__(self, limit_s: float) -> None:
        self._began = time.monotonic()
        self._limit_s = limit_s

    def passed(self) -> bool:
        """Whether it is over, by how slow the machine is now."""
        waited = time.monotonic() - self._began
        return waited > self._limit_s and waited > seconds(self._limit_s)

    def __str__(self) -> str:
        return f"still running after {time.monotonic() - self._began:.0f} s"


def seconds(limit_s: float) -> float:
    """`limit_s` of an idle machine as a timeout for this one, by how slow it was at the start of the tests or
    is now."""
    return limit_s * max(calibration(), slowness())


@functools.cache
def calibration() -> float:
    """The slowness at the start of the tests: the median of five."""
    return sorted(slowness() for _ in range(5))[2]


def slowness() -> float:
    """How many times slower this machine is now than an idle one, at least 1: by a small computation, and by
    how many processes want a core."""
    began = time.perf_counter()
    sum(i * i for i in range(250_000))
    computed = (time.perf_counter() - began) / _REFERENCE_S
    return max(1.0, computed, os.getloadavg()[0] / (os.cpu_count() or 1))
