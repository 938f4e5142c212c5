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


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's cgroup allows (version 2); None without a limit.

    Args:
        root: where /proc and /sys lie.
    """
    limits = []
    for folder in _cgroups(root):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota not in ("", "max"):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that processes of this host can still take: what the kernel says, and no more than what each
    cgroup that they are in leaves.

    Args:
        root: where /proc and /sys lie.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder in _cgroups(root):
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit not in ("", "max"):
            free = min(free, max(0, int(limit) - int(used or 0)))
    return free


def _cgroups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it."""
    top = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            folder = top / line.removeprefix("0::").strip("/")
            yield from (path for path in (folder, *folder.parents) if path.is_relative_to(top))


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing where there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def threads_for(mine: frozenset[int], of_host: Sequence[frozenset[int]], limit: float | None) -> int:
    """`fair_share`, but no more than this rank's part of the cgroup's limit; at least 1."""
    share = fair_share(mine, of_host)
    return share if limit is None else max(1, min(share, int(limit / len(of_host))))
