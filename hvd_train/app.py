"""A whole run, from the command line or from Python; and afterwards its model, in one process without MPI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hvd_train.agree import together
from hvd_train.checkpoint import find_checkpoint
from hvd_train.claim import NoClaim, Ownership
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import Config
from hvd_train.data.format import SampleSpec
from hvd_train.errors import RunDirectoryError
from hvd_train.model_state import load_state
from hvd_train.record.console import make_console
from hvd_train.record.events import EventLog
from hvd_train.record.notice import make_notice
from hvd_train.record.reports import NullRecorder, Recorder, Recorders
from hvd_train.run_files import EVENTS_FILE, saved_config
from hvd_train.rundir import RunDirectory, open_run, write_config
from hvd_train.signals import StopRequest
from hvd_train.task import Task, make_task
from hvd_train.wiring import Wiring


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended; the same on every rank."""

    best: float | None
    """Best value of the watched metric; None if nothing was evaluated."""

    final: float | None
    """Its last value."""

    reason: str
    """Why it stopped: the name of the rule in `StopConfig`, or `diverged` or `interrupted`."""

    run: Path
    """The run's folder."""


def train(config: Config, task: Task | None = None, comm: Communicator | None = None) -> Result:
    """Trains as `config` says, on all ranks of the job. Collective.

    Args:
        config: the same on every rank.
        task: what to train, instead of what `config.task` names.
        comm: where the program has one already; else one is connected, and closed at the end.

    Raises `UserError` on every rank, with the same message, for what cannot be run. Any other exception
    on one rank is reported and ends the job, where there are several ranks.
    """
    if comm is not None:
        return _train(config, task, comm)
    with connect(
        config.backend,
        config.sync.wire,
        stall_timeout_s=config.sync.stall_timeout_s,
        step_timeout_s=config.sync.step_timeout_s,
        shared_folder=config.runs,
    ) as connected:
        return _train(config, task, connected)


def _train(config: Config, task: Task | None, comm: Communicator) -> Result:
    wiring = Wiring(config, task, comm)
    with ExitStack() as stack:
        run, claim = _open(config, comm)
        stack.enter_context(claim)
        recorder = stack.enter_context(_recording(comm, run))
        stop_request = stack.enter_context(StopRequest())
        training = wiring.assemble(run, recorder, stop_request, claim)
        stack.callback(wiring.reader.close)
        if run.checkpoint is not None:
            together(comm, lambda: write_config(config, run.folder, claim) if comm.rank == 0 else None)
        recorder.header(wiring.header(run, training))
        stop = training.run()
    return Result(best=stop.best, final=stop.final, reason=stop.reason, run=run.folder)


def _open(config: Config, comm: Communicator) -> tuple[RunDirectory, Ownership]:
    opened = together(comm, lambda: open_run(config) if comm.rank == 0 else None)
    run, claim = opened or (None, NoClaim())
    run = comm.broadcast(run)
    assert run is not None  # rank 0 opened it
    return run, claim


@contextmanager
def _recording(comm: Communicator, run: RunDirectory) -> Iterator[Recorder]:
    recorder = (
        Recorders(EventLog(run.folder / EVENTS_FILE), make_console(), *make_notice())
        if comm.rank == 0
        else NullRecorder()
    )
    try:
        yield recorder
    finally:
        recorder.close()


def load_model(path: str | Path, checkpoint: str = "best", task: Task | None = None) -> nn.Module:
    """The trained model of a run, in evaluation mode. One process, no MPI.

    Args:
        path: a run's folder, or one checkpoint's.
        checkpoint: `best` or `latest`, where `path` is a run.
        task: the task that was trained, where it was not named by the configuration.

    Raises `RunDirectoryError` for a path without a checkpoint, with a damaged one, or with that of another
    model.
    """
    saved = find_checkpoint(Path(path), checkpoint)
    if saved is None:
        raise RunDirectoryError(
            f"{path} has no checkpoint; expected one in {path}/checkpoints. Let the run go on."
        )
    config = saved_config(saved.folder)
    model = (task or make_task(config)).build_model(SampleSpec.from_json(saved.sample))
    try:
        load_state(model, saved.model())
    except RuntimeError as error:
        raise RunDirectoryError(
            f"{saved.folder}: {error}. Load it with the task that the run was trained with."
        ) from None
    return model.eval()
