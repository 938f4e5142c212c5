"""The worker processes of a rank."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, final

import torch

from hvd_train.algorithm.transformed_reader import InThread, Raw, Transformer
from hvd_train.algorithm.workers.channel import BUFFERS, Channel
from hvd_train.algorithm.workers.process import Failed, SetUp
from hvd_train.config import Config
from hvd_train.data.format import SampleSpec
from hvd_train.errors import TaskError, WorkerLost
from hvd_train.tasks.base import Batch, Task

_PROGRAM = "import sys; from hvd_train.algorithm.workers.process import main; main(int(sys.argv[1]))"

_OF_A_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What launchers send to all processes of a job. The rank then decides when it needs no more batches."""

_PATIENCE_S = 2.0
"""How long a worker may go on with its last batch at the end of a run."""


@final
class Workers:
    """So many new processes, without a task yet. Start them before MPI is initialised: a process that uses
    MPI should start no others.

    They end with this process, however it ends, or after the body of `with`.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        # As this process finds its modules, so do they.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        for _ in range(count):
            ours, theirs = socket.socketpair()
            with theirs, _blocked(_OF_A_JOB):
                process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": path},
                )
            self._processes.append(process)
            self._channels.append(Channel(ours))

    def __len__(self) -> int:
        return len(self._processes)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
            process.kill()
            process.wait()

    def send(self, worker: int, message: Any, tensors: Batch | None = None) -> None:
        """Raises `WorkerLost`."""
        try:
            self._channels[worker].send(message, tensors)
        except (EOFError, ConnectionError):
            raise self._lost(worker) from None

    def receive(self, worker: int) -> tuple[Any, Batch]:
        """Raises `WorkerLost`."""
        try:
            return self._channels[worker].receive()
        except (EOFError, ConnectionError):
            raise self._lost(worker) from None

    def _lost(self, worker: int) -> WorkerLost:
        process = self._processes[worker]
        try:
            code = process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerLost(
            f"worker process {worker + 1} of {len(self)} (pid {process.pid}) {how}; expected it to transform "
            "batches until the end of the run. If memory was short, as SIGKILL often means, set a lower "
            "data.workers or data.batch_size; else see what it printed."
        )


@contextlib.contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """In this thread, and for as long as they live in the processes that it starts in the body."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_transformer(workers: Workers | None, task: Task, config: Config, sample: SampleSpec) -> Transformer:
    """In the worker processes, if there are any, else in this one."""
    return InProcesses(workers, config, sample) if workers else InThread(task, config.seed)


@final
class InProcesses(Transformer):
    """Transforms batches in worker processes, each in turn, so that results come in the order of the batches.

    Raises `TaskError` where a worker cannot make the task. Waits until all have made it.
    """

    def __init__(self, workers: Workers, config: Config, sample: SampleSpec) -> None:
        self.capacity = (BUFFERS - 1) * len(workers) + 1
        self.numbered = True
        self._workers = workers
        self._task = config.task
        self._given = self._taken = 0
        for worker in range(len(workers)):
            workers.send(worker, SetUp(config, sample))
        for worker in range(len(workers)):
            answer, _ = workers.receive(worker)
            if isinstance(answer, Failed):
                raise TaskError(
                    f"a process of data.workers cannot make the task {self._task}:\n{answer.reason}"
                )

    def give(self, raw: Raw) -> None:
        worker = self._given % len(self._workers)
        tensors = {name: torch.from_numpy(array) for name, array in raw.arrays.items()}
        self._workers.send(worker, (raw.epoch, raw.rows), tensors)
        self._given += 1

    def take(self) -> Batch:
        answer, batch = self._receive()
        if isinstance(answer, Failed):
            raise TaskError(
                f"transform of {self._task} failed in a process of data.workers. Correct it; with "
                f"data.workers = 0 it is called in the rank's own process. {answer.reason}"
            )
        return batch

    def discard(self) -> None:
        while self._taken < self._given:
            self._receive()

    def _receive(self) -> tuple[Any, Batch]:
        worker = self._taken % len(self._workers)
        self._taken += 1
        return self._workers.receive(worker)
