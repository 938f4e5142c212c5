"""What this host offers: cores, shared fairly among its ranks, and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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
    for folder in _cgroups(root, ""):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota not in ("", "max"):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def throttling(root: Path = Path("/")) -> tuple[int, int]:
    """Periods of this process's cgroups so far, and how many of them ended early because their limit on CPU
    time was used up; of the cgroup that was held back most. (0, 0) without a limit.

    Args:
        root: where /proc and /sys lie.
    """
    seen = [(0, 0)]
    for folder in (*_cgroups(root, ""), *_cgroups(root, "cpu")):
        stat = dict(line.split(" ", 1) for line in _text(folder / "cpu.stat").splitlines() if " " in line)
        seen.append((int(stat.get("nr_periods", 0)), int(stat.get("nr_throttled", 0))))
    return max(seen, key=lambda periods_throttled: (periods_throttled[1], periods_throttled[0]))


def resident_memory(root: Path = Path("/")) -> int:
    """Bytes of this process in memory, those that it shares with others included."""
    return _in_use(root, "VmRSS:")


def available_memory(root: Path = Path("/"), ranks: int = 1, environ: Mapping[str, str] = os.environ) -> int:
    """Bytes that processes of this host can still take together: the least of what the kernel, each memory
    cgroup that they are in and Slurm's allocation leave.

    Args:
        root: where /proc and /sys lie.
        ranks: processes like this one, which use as much memory already.
        environ: may hold what Slurm allocated.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    folders = (*_cgroups(root, ""), *_cgroups(root, "memory"))
    left = [left for folder in folders for left in _left_by_cgroup(folder)]
    left += [allocated - ranks * _in_use(root, "VmRSS:") for allocated in _allocated_by_slurm(environ)]
    return max(0, min([free, *left]))


def share_of_memory(ranks: int, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Bytes that each of the `ranks` processes of this host can still take: its part of `available_memory`,
    and no more than its own limits (`ulimit -v`, `-d`) leave."""
    return max(0, min([available_memory(root, ranks, environ) // ranks, *_left_by_limits(root)]))


_CGROUP_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)
"""Files of a cgroup with a limit and with what counts against it: two of version 2, two of version 1."""


def _left_by_cgroup(folder: Path) -> Iterator[int]:
    """What each limit of a cgroup leaves. Cached pages of files that have not been used lately count as used
    there, but the kernel reclaims them before it refuses memory."""
    stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    for limit, used in _CGROUP_LIMITS:
        most = _text(folder / limit)
        if most not in ("", "max"):
            yield int(most) - int(_text(folder / used) or 0) + reclaimable
    if "hierarchical_memory_limit" in stat:  # of a cgroup above, perhaps one that a container does not see
        used_here = int(_text(folder / "memory.usage_in_bytes") or 0)
        yield int(stat["hierarchical_memory_limit"]) - used_here + reclaimable


def _left_by_limits(root: Path) -> Iterator[int]:
    """What the limits of this process on its address space and on its data leave."""
    for line in _text(root / "proc/self/limits").splitlines():
        for name, used in (("Max address space", "VmSize:"), ("Max data size", "VmData:")):
            if line.startswith(name):
                soft = line.removeprefix(name).split()[0]
                if soft != "unlimited":
                    yield int(soft) - _in_use(root, used)


def _in_use(root: Path, field: str) -> int:
    """Bytes of this process, by the name of a line in /proc/self/status."""
    lines = _text(root / "proc/self/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _allocated_by_slurm(environ: Mapping[str, str]) -> Iterator[int]:
    """Bytes of this host that the job asked for. Slurm counts in MiB; 0 stands for all."""
    per_node = environ.get("SLURM_MEM_PER_NODE", "")
    per_cpu, cpus = environ.get("SLURM_MEM_PER_CPU", ""), environ.get("SLURM_CPUS_ON_NODE", "")
    if per_node.isdecimal() and int(per_node):
        yield int(per_node) << 20
    if per_cpu.isdecimal() and cpus.isdecimal() and int(per_cpu):
        yield int(per_cpu) * int(cpus) << 20


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it, as far as they are mounted here: of the
    hierarchy of version 2, or with a `controller` of its hierarchy of version 1."""
    lines = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    own = next((path for _, names, path in lines if controller in names.split(",")), None)
    top = _mounted_cgroup(root, controller)
    if own is None or top is None:
        return
    mount, above = top
    inside = own if above == "/" else own.removeprefix(above) if f"{own}/".startswith(f"{above}/") else ""
    # A container may see a path of the host, or one that leads out of what it sees: then only the top.
    folder = mount if ".." in inside.split("/") else mount / inside.strip("/")
    yield from (path for path in (folder, *folder.parents) if path.is_relative_to(mount))


def _mounted_cgroup(root: Path, controller: str) -> tuple[Path, str] | None:
    """Where a hierarchy of cgroups is mounted, and which of its cgroups is at the top there."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind, options = left.split(), right.split(" ")[0], right.split(" ")[-1].split(",")
        if (kind == "cgroup2") if not controller else (kind == "cgroup" and controller in options):
            return root / fields[4].strip("/"), fields[3]
    return None


def _text(path: Path) -> str:
    """The contents of a file of the kernel; empty if there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def file_system(path: Path, root: Path = Path("/")) -> str:
    """The type of the file system that an absolute path is on, as the kernel calls it."""
    best, kind = -1, "an unknown file system"
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mounted = Path(before.split()[4].replace("\\040", " "))
        # Of two mounts in one place the later hides the earlier.
        if path.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), after.split()[0]
    return kind


LOCAL = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "tmpfs", "xfs", "zfs")
)
"""Types of file systems whose files are on this host."""


def threads_for(mine: frozenset[int], of_host: Sequence[frozenset[int]], limit: float | None) -> int:
    """`fair_share`, but no more than this rank's part of the cgroup's limit; at least 1."""
    share = fair_share(mine, of_host)
    return share if limit is None else max(1, min(share, int(limit / len(of_host))))
