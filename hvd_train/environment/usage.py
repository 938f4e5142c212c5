"""What this process uses of its host, over time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import final

from hvd_train.environment import machine


@final
@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process used between two samples."""

    rss_bytes: int
    """Resident memory, shared memory included."""

    cpu: float
    """Cores that were busy."""

    throttled: float
    """The share of the periods of its cgroup in which the limit on CPU time was used up; 0 without one."""

    available_bytes: int
    """Memory that the host, or the cgroup, can still give."""


@final
class UsageSampler:
    """Samples this process; the first sample is since the sampler was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._periods, self._throttled = machine.throttling()

    def sample(self) -> Usage:
        """Since the last sample. Reads some files of /proc and /sys."""
        wall, cpu = time.perf_counter(), time.process_time()
        periods, throttled = machine.throttling()
        usage = Usage(
            rss_bytes=machine.resident_memory(),
            cpu=(cpu - self._cpu) / max(wall - self._wall, 1e-9),
            # Now another cgroup may be the one that was held back most.
            throttled=min(max((throttled - self._throttled) / max(periods - self._periods, 1), 0.0), 1.0),
            available_bytes=machine.available_memory(),
        )
        self._wall, self._cpu, self._periods, self._throttled = wall, cpu, periods, throttled
        return usage
