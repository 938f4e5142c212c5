"""What this host offers: cores, shared fairly among its ranks, and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

AFFINITY = frozenset(os.sched_getaffinity(0))
"""The cores that this process may run on, read when this module is first imported: do that before torch is,
as its thread pool may bind the main thread."""


def fair_share(mine: frozenset[int], of_host: Sequence[frozenset[int]]) -> int:
    """Threads for a rank with the mask `mine` among the ranks of its host, whose masks are `of_host`
    (its own included): each core is divided among the ranks that may run on it; at least 1."""
    share = sum((Fraction(1, sum(core in mask for mask in of_host)) for core in mine), Fraction(0))
    return max(1, int(share))


def cpu_limit() -> float | None:
    """Cores' worth of time that this process's cgroup allows (version 2); None without a limit."""
    limits = []
    for text in _cgroup_files("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def available_memory() -> int:
    """Bytes that processes of this host can still take: what the kernel says, and no more than what the
    cgroup leaves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limits = [int(text) for text in _cgroup_files("memory.max") if text.strip() != "max"]
    used = [int(text) for text in _cgroup_files("memory.current")][:1] or [0]
    return min([free, *(max(0, limit - used[0]) for limit in limits)])


def _cgroup_files(name: str, root: Path = Path("/sys/fs/cgroup")) -> Iterator[str]:
    """The file of that name in this process's cgroup and in those above it, where it exists."""
    try:
        line = next(x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
    except (OSError, StopIteration):
        return
    folder = root / line.removeprefix("0::").strip("/")
    for path in (folder, *folder.parents):
        if path.is_relative_to(root) and (path / name).is_file():
            yield (path / name).read_text()


def threads_for(mine: frozenset[int], of_host: Sequence[frozenset[int]], limit: float | None) -> int:
    """`fair_share`, but no more than this rank's part of the cgroup's limit; at least 1."""
    share = fair_share(mine, of_host)
    return share if limit is None else max(1, min(share, int(limit / len(of_host))))
