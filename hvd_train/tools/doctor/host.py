"""What this host lets a rank do. Nothing here starts or loads anything."""

from __future__ import annotations

import mmap
import os
import resource
from pathlib import Path

from hvd_train.environment import machine
from hvd_train.tools.doctor.check import Check, numbers, size

ROOT = Path("/")

_SEGMENT_BYTES = 16 << 20
"""What Open MPI 5.0 allocates in /dev/shm for each rank of a host, though it uses little of it."""

_FILES = 256
"""Files that a rank may have open beside its connections: libraries, shards, memory of its peers."""


def affinity() -> Check:
    """The cores that this process may run on."""
    mine = machine.AFFINITY
    seen = f"{'core' if len(mine) == 1 else 'cores'} {numbers(sorted(mine))} of {os.cpu_count()}"
    return Check(name="affinity", seen=seen)


def cpu_limit(root: Path = ROOT) -> Check:
    """What the cgroup allows."""
    limit = machine.cpu_limit(root)
    if limit is None:
        return Check(name="cpu.max", seen="no limit of a cgroup")
    seen = f"{limit:g} cores' worth of time"
    if limit >= len(machine.AFFINITY):
        return Check(name="cpu.max", seen=seen)
    seen = f"{seen}, fewer than the {len(machine.AFFINITY)} cores of the affinity mask"
    remedy = "Start no more ranks than that, or raise the limit of the container or job. Threads respect it."
    return Check(name="cpu.max", status="warning", seen=seen, remedy=remedy)


def single_copy(root: Path = ROOT) -> Check:
    """Whether an MPI can copy from process to process at once. The ring does not need it."""
    name = "CMA, XPMEM"
    xpmem = (root / "dev/xpmem").exists()
    scope = _text(root / "proc/sys/kernel/yama/ptrace_scope") or "0"
    with_xpmem = "/dev/xpmem is there" if xpmem else "no /dev/xpmem"
    seen = {
        "0": f"CMA is open to processes of one user (ptrace_scope 0); {with_xpmem}",
        "1": f"CMA needs the peer's permission (ptrace_scope 1), which Open MPI gives; {with_xpmem}",
    }.get(scope)
    if seen is not None or xpmem:
        return Check(name=name, seen=seen or f"CMA is closed (ptrace_scope {scope}), but {with_xpmem}")
    seen = f"CMA is closed (ptrace_scope {scope}), and {with_xpmem}"
    remedy = (
        "It slows down only `--backend mpi` and Horovod: messages within a host are copied twice. As root: "
        "`sysctl kernel.yama.ptrace_scope=0`."
    )
    return Check(name=name, status="warning", seen=seen, remedy=remedy)


def shared_memory(root: Path = ROOT) -> Check:
    """Whether memory can be shared at all, and what /dev/shm has left for an MPI's own."""
    name = "shared memory"
    descriptor = os.memfd_create("hvd_train.doctor")
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as mapped:
            mapped[0] = 1
    finally:
        os.close(descriptor)
    folder = root / "dev/shm"
    if not folder.is_dir():
        remedy = "Mount a tmpfs there: MPI within a host uses it. The ring's own memory is not in it."
        return Check(name=name, status="warning", seen="memfd works, but there is no /dev/shm", remedy=remedy)
    free = os.statvfs(folder)
    free_bytes = free.f_bavail * free.f_frsize
    if free_bytes >= _SEGMENT_BYTES * len(machine.AFFINITY):
        return Check(name=name, seen=f"memfd works; /dev/shm is of {size(free.f_blocks * free.f_frsize)}")
    seen = f"memfd works, but /dev/shm has only {size(free_bytes)} free"
    remedy = (
        f"An MPI may want up to {size(_SEGMENT_BYTES)} a rank there (the ring's own memory is not in it): "
        "give the container more (`--shm-size=1g`), or remove files that were left there."
    )
    return Check(name=name, status="warning", seen=seen, remedy=remedy)


def fabrics(root: Path = ROOT) -> list[str]:
    """Adapters of fast networks."""
    folders = (root / "sys/class" / kind for kind in ("infiniband", "cxi"))
    return sorted(device.name for folder in folders if folder.is_dir() for device in folder.iterdir())


def locked_memory(root: Path = ROOT) -> Check:
    """`ulimit -l`, which matters where a fast network pins memory."""
    name = "ulimit -l"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    seen = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    adapters = fabrics(root)
    if not adapters:
        return Check(name=name, seen=f"{seen}; no adapter of a fast network needs more")
    if soft == resource.RLIM_INFINITY:
        return Check(name=name, seen=f"{seen}, for {', '.join(adapters)}")
    remedy = (
        "Set `memlock unlimited` in /etc/security/limits.conf; under Slurm also "
        "PropagateResourceLimitsExcept=MEMLOCK."
    )
    seen = f"{seen}, but {', '.join(adapters)} must pin memory"
    return Check(name=name, status="warning", seen=seen, remedy=remedy)


def open_files(world_size: int) -> Check:
    """`ulimit -n`, against one connection for each peer."""
    name = "ulimit -n"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world_size + _FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Check(name=name, seen=f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} open files")
    seen = f"{soft} open files, and a rank in a world of {world_size} may need {needed}"
    remedy = f"`ulimit -n {needed}` before the launcher (the hard limit is {hard}), on every host."
    return Check(name=name, status="warning", seen=seen, remedy=remedy)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
