"""The process that holds a run's folder, and whether it lives, as far as another process can see that."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that made a claim."""

    host: str
    pid: int
    boot: str
    """The boot of the kernel that the process runs on."""
    pids: str
    """Its PID namespace: containers on one host have several."""
    start: int
    """When the process began, in clock ticks since `boot`: process numbers are reused."""
    job: str
    """Slurm's job with its cluster, empty outside of one."""
    restart: int
    """How often Slurm has requeued the job."""
    since: str
    token: str
    released: bool = False

    @classmethod
    def this_process(cls, environ: Mapping[str, str]) -> Holder:
        """For a new claim of this process."""
        job, restart = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            pids=_link("/proc/self/ns/pid"),
            start=int(_stat(os.getpid())[19]),
            job=job and f"{job}@{environ.get('SLURM_CLUSTER_NAME', '')}",
            restart=int(restart) if restart.isdecimal() else 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job.partition('@')[0]}" if self.job else ""
        return f"process {self.pid} on {self.host} (since {self.since}{job})"

    def is_earlier_start_than(self, other: Holder) -> bool:
        """Whether `other` is a later start of the same Slurm job, which begins when the earlier has ended."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def lives(self, here: Holder) -> bool | None:
        """Whether the process exists, stopped or not; None if `here`, this process, cannot see that: on
        another host, in another container, or where only its owner may see it."""
        place = (self.host, self.boot, self.pids)
        if not all(place) or place != (here.host, here.boot, here.pids):
            return None
        stat = _stat(self.pid)
        if not stat:
            return None if _exists(self.pid) else False
        return stat[0] not in "ZX" and int(stat[19]) == self.start


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on, as proc(5) has them; empty if it cannot be seen."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
