"""Runs a launcher and leaves no process of it behind, however this program ends.

    hvd_train launch     what the user sees and signals; passes the signals on
      keeper             in a session of its own; becomes the parent of every orphan below it
        launcher         in a session of its own
          ...            ranks, daemons, ssh; horovodrun starts its mpirun in yet another session

If `hvd_train launch` is killed, the kernel signals the keeper, which ends all others. If the keeper is
killed, the kernel signals the launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from hvd_train.io.output import warn
from hvd_train.launching import processes
from hvd_train.launching.lines import Line

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PARENT_DIED = signal.SIGUSR2
_GRACE_S = 5.0
"""From the request to end at once to SIGKILL: an mpirun needs a moment to end the ranks of other hosts."""
_POLL_S = 0.5
_CLEANER = "multiprocessing.resource_tracker"
"""Removes the semaphores of a Python program that was killed, such as horovodrun, and then ends by itself."""

MPI_LAUNCHERS = (
    "mpirun",
    "prterun",
    "orterun",
    "orterun_wrapper",
    "ompirun_wrapper",
    "mpiexec.hydra",
    "mpiexec",
)
"""What may be found below horovodrun."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a launcher ended."""

    status: int
    """Its exit status; 128 + N if signal N killed it."""

    signal: int = 0
    """The signal that ended everything at once, if one did."""


@dataclass(kw_only=True)
class Job:
    """What the keeper must know of a job."""

    line: Line
    by_horovodrun: bool = False
    can_stop: Callable[[], bool] | None = None
    """Whether the ranks listen to a request to stop: before they do, a signal kills them. None for ranks that
    never do, and are ended at once."""
    start_timeout_s: float = 0.0
    """The job is ended if its ranks have not connected by then; 0: never."""
    have_met: Callable[[], bool] | None = None
    """Whether the ranks have connected. None where that is not known."""


def run(job: Job) -> Ended:
    """Runs it to its end, with this program's output and no input. Raises nothing: a launcher that cannot be
    started has status 127."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, _PARENT_DIED, signal.SIGCHLD})
    read, write = os.pipe()
    parent = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(read)
        try:
            _keep(job, parent, write)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)  # what is above this function belongs to the parent
    os.close(write)

    def pass_on(number: int, frame: FrameType | None) -> None:
        processes.send(keeper, signal.Signals(number))

    before = {s: signal.signal(s, pass_on) for s in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(keeper, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    if not said:  # the keeper was killed, or failed
        return Ended(status=1)
    status, ended_by = map(int, said.split())
    return Ended(status=status, signal=ended_by)


def _keep(job: Job, parent: int, pipe: int) -> None:
    """Runs the keeper, which finally reports to `hvd_train launch` how the launcher ended."""
    os.setsid()
    processes.adopt_orphans()
    processes.die_with(parent, _PARENT_DIED)
    try:
        ended = _Keeper(job).run()
    except OSError as error:
        warn(f"{job.line.argv[0]} cannot be started: {error}.")
        ended = Ended(status=127)
    os.write(pipe, f"{ended.status} {ended.signal}".encode())


@dataclass
class _Keeper:
    job: Job
    asked: bool = False
    """Whether a stop was asked for."""
    interrupts: int = 0
    """SIGINTs so far."""
    passed_on: bool = False
    """Whether the ranks know."""
    ended_by: int = 0
    """The signal that ends everything at once."""
    deadline: float = field(default=float("inf"))
    """When what is left is killed, by the monotonic clock."""
    status: int | None = None
    """The launcher's, once it has ended."""
    start_by: float = field(default=float("inf"))
    """When the ranks must have connected, by the monotonic clock."""

    def run(self) -> Ended:
        process = subprocess.Popen(  # kept: one that is dropped takes its child's status with it
            self.job.line.argv,
            env={**os.environ, **self.job.line.environ},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_prepare(os.getpid()),
        )
        launcher = process.pid
        if self.job.start_timeout_s:
            self.start_by = time.monotonic() + self.job.start_timeout_s
        awaited = {*STOP_SIGNALS, _PARENT_DIED, signal.SIGCHLD}
        while True:
            got = signal.sigtimedwait(awaited, _POLL_S)
            if got is not None and got.si_signo != signal.SIGCHLD:
                self._signalled(got.si_signo, launcher)
            for pid, status in processes.reap().items():
                if pid == launcher:
                    self.status = _exit_status(status)
            if self.asked and not self.passed_on and not self.ended_by:
                self._ask(launcher)
            if time.monotonic() > self.start_by and self.status is None:
                self._give_up(launcher)
            if self._all_gone():
                return Ended(status=self.status or 0, signal=self.ended_by)

    def _signalled(self, number: int, launcher: int) -> None:
        self.interrupts += number == signal.SIGINT
        # As for `StopRequest`: only a second Ctrl-C means it. When Slurm ends a job it sends SIGTERM to every
        # process: this one gets it twice, from Slurm and from `hvd_train launch`.
        at_once = number == _PARENT_DIED or self.interrupts > 1
        if self.job.can_stop is None or at_once:
            if not self.ended_by:
                self.ended_by = signal.SIGTERM if number == _PARENT_DIED else number
                self._end(launcher)
        elif not self.asked:
            self.asked = True
            warn(
                f"{signal.Signals(number).name}: the run ends after its round, with a checkpoint. "
                "A second Ctrl-C ends it at once, without one."
            )

    def _ask(self, launcher: int) -> None:
        """Passes the request to stop on, as soon as the ranks listen."""
        if self.status is not None or self.job.can_stop is None or not self.job.can_stop():
            return
        self.passed_on = True
        if not self.job.by_horovodrun:
            processes.send(launcher, signal.SIGUSR1)
            return
        # It passes no signal on to its mpirun; over Gloo it passes SIGTERM to the ranks.
        mpirun = self._mpi_launcher()
        processes.send(mpirun or launcher, signal.SIGUSR1 if mpirun else signal.SIGTERM)

    def _give_up(self, launcher: int) -> None:
        """Ends a job that has not begun, unless it has."""
        self.start_by = float("inf")
        if self.ended_by or self.job.have_met is None or self.job.have_met():
            return
        running = dict.fromkeys(filter(None, map(processes.description, processes.descendants())))
        warn(
            f"the ranks have not connected within {self.job.start_timeout_s:g} s (--start-timeout); the job "
            f"ends. Expected all of them to connect and to open the data by then. Still running here: "
            f"{', '.join(running) or 'nothing'}. `launch --check-hosts` and `doctor` find what hangs."
        )
        self._end(launcher)

    def _mpi_launcher(self) -> int:
        """The launcher below horovodrun; 0 over Gloo."""
        return next((pid for pid in processes.descendants() if processes.name(pid) in MPI_LAUNCHERS), 0)

    def _end(self, launcher: int) -> None:
        """Ends everything: first the launchers, which end the ranks of other hosts."""
        self.deadline = time.monotonic() + _GRACE_S
        if processes.name(launcher) == "srun":
            # Two within a second are its way to end a step.
            processes.send(launcher, signal.SIGINT)
            time.sleep(0.1)
            processes.send(launcher, signal.SIGINT)
            return
        processes.send(self._mpi_launcher() or launcher, signal.SIGTERM)

    def _all_gone(self) -> bool:
        """Whether the launcher and all below it have ended. What outlives the launcher is ended."""
        left = processes.descendants()
        if not left:
            return self.status is not None
        now = time.monotonic()
        if self.status is not None and self.deadline == float("inf"):
            self.deadline = now + _GRACE_S
            processes.send_all(signal.SIGTERM)
        elif now > self.deadline:
            patience_is_over = now > self.deadline + _GRACE_S
            processes.send_all(signal.SIGKILL, spare="" if patience_is_over else _CLEANER)
        return False


def _prepare(keeper: int) -> Callable[[], None]:
    """What the launcher does between fork and exec."""

    def prepare() -> None:
        processes.die_with(keeper, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return prepare


def _exit_status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code
