"""A real Slurm over emulated hosts: slurmctld on h1, slurmd and munged on each.

Every file of it (configuration, key, state, spool, logs) lies in the private memory of a host, and every
daemon is a process of one: what hosts.py says of hosts, that nothing of them stays, holds for Slurm too.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.hosts import Hosts
from tests.deadlines import Deadline
from tests.launching import MARK, Job

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")

CPUS = 4
"""Of each host, as Slurm believes: more than the machine may have."""

_PLUGIN = "mpi_pmix.so"
_FOLDER = "/run/slurm"
_CONF = f"{_FOLDER}/slurm.conf"

# A requeued job waits for cred_expire before it starts again. A host that is away for SlurmdTimeout and up to
# 15 s more is down, and taken again as soon as it is back. When a job's grace begins, the tasks of its steps
# get SIGTERM; with `preempt_send_user_signal` the batch shell would get the job's own --signal instead.
_TEXT = """
ClusterName=emulated
SlurmctldHost=h1(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
TmpFS=/run/tmp
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=3600
OverTimeLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
NodeName=h[1-{count}] NodeAddr=10.99.0.[1-{count}] CPUs={cpus} CoresPerSocket={cpus} RealMemory=4096
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why this machine cannot run Slurm, which hosts.missing() does not know; empty if it can."""
    absent = [tool for tool in (*DAEMONS, *COMMANDS) if _which(tool) is None]
    if not absent and _pmix_folder() is not None:
        return ""
    return f"{', '.join(absent) or 'libpmix.so.2'} not found: install slurm-wlm, munge and libpmix2"


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _pmix_folder() -> Path | None:
    """Where Debian's libpmix2 lies. Slurm opens `libpmix.so` there, which comes with the -dev package."""
    return next((f.parent for f in sorted(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2"))), None)


class Slurm:
    """Slurm over all of `hosts`. `low` is the partition by default, `high` preempts it by requeueing.

    Args:
        parameters: lines to add to slurm.conf.
    """

    def __init__(self, hosts: Hosts, parameters: str = "") -> None:
        self.hosts = hosts
        self._key = secrets.token_hex(64)
        self._conf = _TEXT.format(folder=_FOLDER, count=len(hosts.numbers), cpus=CPUS, extra=parameters)
        for number in hosts.numbers:
            self._prepare(number)
        self._daemon(1, "slurmctld", "-f", _CONF)
        for number in hosts.numbers:
            self._daemon(number, "slurmd", "-f", _CONF, "-N", f"h{number}")
        self.wait_for_nodes(*hosts.numbers)

    def _prepare(self, host: int) -> None:
        """The files of a host that has just come up, and its munged."""
        for folder in (_FOLDER, f"{_FOLDER}/state", f"{_FOLDER}/spool", "/run/munge"):
            self.hosts.file(host, folder).mkdir(mode=0o755)
        self.hosts.file(host, _CONF).write_text(self._conf)
        key = self.hosts.file(host, f"{_FOLDER}/munge.key")
        key.touch(0o600)
        key.write_text(self._key)
        files = [f"--{kind}-file={_FOLDER}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._name_pmix(host)
        # --force: the folders above it are another user's, as in a container.
        self._daemon(host, "munged", "--force", *files)

    def _name_pmix(self, host: int) -> None:
        """Gives the library the name that Slurm opens, on this host only."""
        folder = _pmix_folder()
        assert folder is not None
        if (folder / "libpmix.so").exists():
            return
        aside = f"{_FOLDER}/pmix"
        script = f"""
            mkdir {aside}
            mount --bind {folder} {aside}
            mount -t tmpfs -o mode=755 pmix {folder}
            ln -s {aside}/* {folder}
            ln -s libpmix.so.2 {folder}/libpmix.so
        """
        self._call(host, "bash", "-euc", script)

    def _daemon(self, host: int, name: str, *arguments: str) -> None:
        path = _which(name)
        assert path is not None
        self._call(host, path, *arguments)

    def _call(
        self, host: int, *argv: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        job = self.run(*argv, host=host, cwd=cwd, env=env)
        assert job.returncode == 0, f"{argv} ended with {job.returncode}: {job.output}\n{self.log()}"
        return job.stdout

    def run(
        self,
        *argv: str,
        host: int = 1,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        deadline_s: float = 60,
    ) -> Job:
        """A command that knows of this Slurm, on a host. A daemon or job that it starts is not its own."""
        line = ["env", "-u", MARK, f"SLURM_CONF={_CONF}", *argv]
        return self.hosts.run(host, line, deadline_s=deadline_s, cwd=cwd, env=env)

    def log(self) -> str:
        """What slurmctld has said lately."""
        try:
            return self.hosts.file(1, f"{_FOLDER}/slurmctld.log").read_text()[-4000:]
        except OSError:
            return ""

    def wait_for_nodes(self, *numbers: int, state: str = "idle", deadline_s: float = 40) -> None:
        """Until these hosts are in a state of sinfo's."""
        names = {f"h{number}" for number in numbers}
        deadline = Deadline(deadline_s)
        while True:
            seen = self.run("sinfo", "-h", "-N", "-p", "low", "-t", state, "-o", "%N")
            if names <= set(seen.stdout.split()):
                return
            assert not deadline.passed(), f"{names} not {state}: {seen.output}{self.log()}"
            time.sleep(0.1)

    def boot(self, host: int) -> None:
        """Brings a host up again, and its part of Slurm."""
        self.hosts.boot(host)
        self._prepare(host)
        self._daemon(host, "slurmd", "-f", _CONF, "-N", f"h{host}")

    def sbatch(self, *argv: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submits a job from h1; returns its id."""
        return self._call(1, "sbatch", "--parsable", *argv, cwd=cwd, env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job, by its own names (`JobState`, `ExitCode`, `Restarts`, ...)."""
        shown = self._call(1, "scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, job: str, *states: str, deadline_s: float = 60, log: Path | None = None) -> dict[str, str]:
        """Until a job is in one of some states; returns what `job` shows of it then."""
        deadline = Deadline(deadline_s)
        while True:
            seen = self.job(job)
            if seen["JobState"] in states:
                return seen
            printed = log.read_text() if log and log.exists() else ""
            said = f"{seen}\n{printed}\n{self.log()}"
            assert seen["JobState"] in UNFINISHED, f"job {job} is {seen['JobState']}: {said}"
            assert not deadline.passed(), f"job {job} is not {' or '.join(states)}: {said}"
            time.sleep(0.1)


UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "PREEMPTED", "NODE_FAIL", "REQUEUED")
"""States of a job that may yet become another."""
