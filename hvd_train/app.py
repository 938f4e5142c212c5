"""A whole run, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvd_train.algorithm.workers.pool import Workers
from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import Config, RecordConfig
from hvd_train.data.python import registry
from hvd_train.data.rows import Rows
from hvd_train.errors import CheckpointNotSaved, ConfigError, UserError
from hvd_train.monitor import reporting
from hvd_train.preparation import prepare
from hvd_train.record.background import close_all
from hvd_train.record.console import make_console
from hvd_train.record.events import EventLog
from hvd_train.record.notice import make_notice
from hvd_train.record.reports import NullRecorder, Recorder, Recorders
from hvd_train.record.sinks import make_sinks
from hvd_train.run.claim import NoClaim, Ownership
from hvd_train.run.directory import RunDirectory, discard, open_run, write_config
from hvd_train.run.layout import EVENTS_FILE
from hvd_train.run.node_cache import node_cache
from hvd_train.run.signals import StopRequest
from hvd_train.tasks.base import Task
from hvd_train.wiring import Wiring


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended; the same on every rank."""

    best: float | None
    """Best value of the watched metric, that of the checkpoint `best`; None if nothing was evaluated."""

    final: float | None
    """Its last value."""

    reason: str
    """Why it stopped: the name of the rule in `StopConfig`, or `interrupted`, or `diverged`: then the
    final model is unusable, and the command line ends with exit code 3."""

    run: Path
    """The run's folder."""


def train(config: Config, task: Task | None = None, comm: Communicator | None = None) -> Result:
    """Trains according to `config`, on all ranks of the job. Collective.

    Args:
        config: the same on every rank.
        task: what to train, instead of what `config.task` names.
        comm: an existing communicator; by default one is connected, and closed at the end. With
            `data.workers` neither this nor `task` can be given.

    Raises on every rank, with the same message, `UserError` for what cannot be run, before the first step,
    and `CheckpointNotSaved` if the run ended but the best model or that of the end could not be written. Any
    other exception on one rank is reported and ends the job, where there are several ranks.
    """
    if config.data.workers and (task is not None or comm is not None):
        given = "a task as an object" if task is not None else "a communicator that exists"
        raise ConfigError(
            f"data.workers = {config.data.workers}: expected 0 with {given}. The processes make the task "
            "themselves and are started before the ranks connect: name the task in config.task, and leave "
            "both arguments out."
        )
    if comm is not None:
        return _train(config, task, comm, None)
    with (
        Workers(config.data.workers) as workers,
        connect(
            config.backend,
            config.sync.wire,
            stall_timeout_s=config.sync.stall_timeout_s,
            step_timeout_s=config.sync.step_timeout_s,
            shared_folder=config.runs,
        ) as connected,
    ):
        return _train(config, task, connected, workers)


def _train(config: Config, task: Task | None, comm: Communicator, workers: Workers | None) -> Result:
    with ExitStack() as stack:
        stack.callback(registry.clear)
        sinks = together(comm, lambda: _sinks(config.record, stack) if comm.rank == 0 else [])
        wiring = Wiring(prepared=prepare(config, task, comm), workers=workers)
        run, claim = _open(config, comm)
        stack.enter_context(claim)
        recorder = stack.enter_context(_recording(comm, run, sinks))
        stop_request = stack.enter_context(StopRequest())
        prepared = wiring.prepared
        parts = prepared.plan.parts
        rows = Rows(parts[comm.rank % len(parts)], prepared.catalog.sample.fields)
        files = rows.files() if config.data.cache else []
        try:
            wiring.copies = stack.enter_context(node_cache(comm, config.data.cache, files))
            training = wiring.assemble(run, recorder, stop_request, claim)
        except UserError:
            if run.is_new and comm.rank == 0:
                discard(run.folder, claim)
            raise
        stack.callback(wiring.reader.close)
        if run.checkpoint is not None:
            together(comm, lambda: write_config(config, run.folder, claim) if comm.rank == 0 else None)
        recorder.header(wiring.header(run, training))
        for fault in wiring.faults:
            recorder.report(fault)
        stop = training.run()
        if config.record.report and comm.rank == 0:
            reporting.write_report(run.folder)
    if stop.missing:
        raise CheckpointNotSaved(
            f"{run.folder}: {stop.missing} Make room, or fix what else failed, and continue with --resume."
        )
    return Result(best=stop.best, final=stop.final, reason=stop.reason, run=run.folder)


def _open(config: Config, comm: Communicator) -> tuple[RunDirectory, Ownership]:
    opened = together(comm, lambda: open_run(config) if comm.rank == 0 else None)
    run, claim = opened or (None, NoClaim())
    run = comm.broadcast(run)
    assert run is not None  # rank 0 opened it
    return run, claim


def _sinks(config: RecordConfig, stack: ExitStack) -> Sequence[Recorder]:
    """What takes the events besides log and console, before anything is begun that it could refuse. They are
    closed last: then the run's folder is free, however slow they are."""
    reporting.check(config)
    sinks = make_sinks(config)
    stack.callback(close_all, sinks)
    return sinks


@contextmanager
def _recording(comm: Communicator, run: RunDirectory, sinks: Sequence[Recorder]) -> Iterator[Recorder]:
    own = (
        Recorders(EventLog(run.folder / EVENTS_FILE), make_console(), *make_notice())
        if comm.rank == 0
        else NullRecorder()
    )
    try:
        yield Recorders(own, *sinks)
    finally:
        own.close()
