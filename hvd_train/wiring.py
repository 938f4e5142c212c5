"""From a configuration to a training that is ready to run. The only place that names concrete classes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_train.algorithm.averaging import Average, NoAverage, StateAverage
from hvd_train.algorithm.evaluate import Evaluator, TrainingLossEvaluator, ValidationEvaluator
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.local_sgd import LocalSGD
from hvd_train.algorithm.local_step import LocalStep, make_optimizer
from hvd_train.algorithm.optimizer_state import OptimizerState
from hvd_train.algorithm.period import FixedPeriod
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.schedule import LearningRate
from hvd_train.algorithm.stopping import Watch
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.algorithm.worker import Worker
from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import versions
from hvd_train.config import Config, flatten
from hvd_train.data.catalog import Catalog, find_shards, look_at_labels, make_catalog, scale_warning
from hvd_train.data.deal import Span, deal
from hvd_train.data.reader import Reader, make_reader
from hvd_train.data.rows import Rows
from hvd_train.environment import machine
from hvd_train.environment.binding import complaints, take_seat
from hvd_train.environment.launcher import detect, forgotten_tasks
from hvd_train.errors import ConfigError, RunDirectoryError, TaskError
from hvd_train.io.output import warn
from hvd_train.io.stateful import State, Stateful
from hvd_train.liveness import phase
from hvd_train.record.reports import FaultReport, Recorder, RunHeader
from hvd_train.run.carry_over import carry_over
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.claim import Ownership
from hvd_train.run.directory import RunDirectory
from hvd_train.run.layout import CHECKPOINTS, anchored
from hvd_train.run.model_state import saved_state
from hvd_train.run.random_state import RandomState, seed_rank
from hvd_train.run.restore import restore, saved_states
from hvd_train.run.resuming import Settings, settings_before
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from hvd_train.run.signals import StopRequest
from hvd_train.tasks.base import Task
from hvd_train.tasks.building import build, refuse_single_rows
from hvd_train.tasks.built_in import takes_tokens
from hvd_train.tasks.load import make_task
from hvd_train.tasks.models import describe, scales_integers


class Wiring:
    """Makes the parts of one training. Making it is collective: what must agree is compared, and what
    fails on one rank fails on all with one message."""

    def __init__(self, config: Config, task: Task | None, comm: Communicator) -> None:
        self.config = config
        self.comm = comm
        self.task_is_given = task is not None
        phase("set-up")
        require_equal(comm, "configurations", flatten(config), "Give every rank the same file and flags.")
        self.versions = versions(comm)
        self._saved: SavedCheckpoint | None = None
        """The checkpoint that the run goes on from; rank 0's choice."""
        self.faults: list[FaultReport] = []
        """What a resume found, to be reported after the header."""
        self.threads = self._share_cores()
        self.task = together(comm, lambda: make_task(config) if task is None else task)
        self.catalog = self._open_catalog()
        require_equal(comm, "data", _facts(self.catalog), "Every rank must see the same shards, whole.")
        for line in self.catalog.warnings if comm.rank == 0 else ():
            warn(line)
        self.parts = deal(self.catalog.train, comm.size)
        self.model, self.optimizer = together(comm, self._build)
        shapes = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in saved_state(self.model)[0].items()}
        require_equal(comm, "models", shapes, "The task must build the same model on every rank.")
        seed_rank(config.seed, comm.rank)

    def _share_cores(self) -> list[int]:
        """Sets torch's threads on this rank; returns those of every rank. Warns of cores that do not fit."""
        cores = self.comm.allgather((self.comm.host, machine.AFFINITY))
        of_host = [mask for host, mask in cores if host == self.comm.host]
        fair = machine.threads_for(machine.AFFINITY, of_host, machine.cpu_limit())
        threads = self.config.threads or fair
        torch.set_num_threads(threads)
        seats = self.comm.allgather(take_seat(self.comm.rank, self.comm.host, threads))
        launcher = detect()
        found = complaints(seats, launcher.unbind, launcher.deals_cores)
        said = [forgotten_tasks(), *map(str, found)]
        for line in said if self.comm.rank == 0 else ():
            if line:
                warn(line)
        return [seat.threads for seat in seats]

    def _open_catalog(self) -> Catalog:
        """Finds the shards; each rank looks at the labels of its part. Collective."""
        data, comm = self.config.data, self.comm
        shards = together(comm, lambda: find_shards(data))
        tokens = takes_tokens(self.task)
        mine = together(comm, lambda: look_at_labels(shards, comm.rank, comm.size, tokens=tokens))
        labels = comm.allgather(mine)
        return together(comm, lambda: make_catalog(shards, data, labels, tokens=tokens))

    def _build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(self.config.seed)
        try:
            model = build(self.task, self.catalog)
        except TaskError as error:
            # Of what the samples are, by their first file.
            raise TaskError(f"{self.catalog.shards[0].path}: {error}") from None
        mine = self.parts[self.comm.rank]
        if self.config.data.batch_size == 1:
            why = "data.batch_size is 1. Give batches of 2 rows or more"
            refuse_single_rows(model, self.task, self.catalog, mine, why)
        elif _num_rows(mine) == 1:
            why = f"rank {self.comm.rank} has no other row. Use fewer ranks"
            refuse_single_rows(model, self.task, self.catalog, mine, why)
        if self.comm.rank == 0 and scales_integers(model):
            warning = scale_warning(self.catalog, self.config.data)
            if warning:
                warn(warning)
        return model, make_optimizer(model, self.config.optim)

    def assemble(
        self, run: RunDirectory, recorder: Recorder, stop_request: StopRequest, claim: Ownership
    ) -> LocalSGD:
        """The training, restored from the run's checkpoint where it goes on. Collective.

        Args:
            claim: this rank's part in the job's claim to the run's folder.
        """
        training = together(self.comm, lambda: self._assemble(run, recorder, stop_request, claim))
        self._check_evaluation(training.evaluator)
        training.checkpoints.prepare()
        self.faults = [_fault("checkpoint_left_out", line, training.progress.rounds) for line in run.left_out]
        if self._saved is not None:
            lost = carry_over(training.checkpoints, training.watch, self._saved)
            if lost:
                self.faults.append(_fault("best_model_lost", lost, training.progress.rounds))
        remarks = list(self.settings.remarks)
        if any(self.comm.allgather(training.worker.restarted)):
            training.worker.restart_epoch()
            remarks.append(
                "the rows of the ranks, or their order, are not those of the checkpoint (other data, number "
                f"of ranks, seed or reading): epoch {training.worker.epochs + 1} begins anew."
            )
        for remark in remarks if self.comm.rank == 0 else ():
            warn(remark)
        return training

    def _assemble(
        self, run: RunDirectory, recorder: Recorder, stop_request: StopRequest, claim: Ownership
    ) -> LocalSGD:
        config, comm = self.config, self.comm
        flat = FlatState(
            self.model,
            self.optimizer,
            comm,
            optimizer_state=config.sync.optimizer_state,
            batch_norm=config.sync.batch_norm,
        )
        moments = flat.moments().keys()
        self.reader = self._make_reader()
        progress = Progress()
        watch = Watch(config.stop, config.evaluate.mode)
        period = FixedPeriod(config.sync.period)
        worker = self._make_worker(self.reader)
        evaluator = self._make_evaluator()
        validation = [(span.shard, span.start, span.stop) for span in self.catalog.validation]
        self.settings = Settings(anchored(config), validation)
        parts: dict[str, Stateful] = {
            "settings": self.settings,
            "progress": progress,
            "watch": watch,
            "evaluator": evaluator,
            "period": period,
            "moments": OptimizerState(self.model, self.optimizer, lambda name, _: name in moments),
            "optimizer": OptimizerState(self.model, self.optimizer, lambda name, _: name not in moments),
            "worker": worker,
            "random": RandomState(config.seed, comm.rank, comm.size),
        }
        learning_rate = LearningRate(config.learning_rate, self.optimizer)
        if run.checkpoint is not None:
            self._saved = SavedCheckpoint.open(run.checkpoint)
            self._restore(self._saved, parts, run.before)
            self._refuse_if_over(progress, worker)
        checkpoints = Checkpoints(
            folder=run.folder / CHECKPOINTS,
            comm=comm,
            config=config.checkpoint,
            model=self.model,
            parts=parts,
            shared=frozenset(("settings", "progress", "watch", "evaluator", "period", "moments")),
            sample=self.catalog.sample,
            recorder=recorder,
            claim=claim,
        )
        return LocalSGD(
            comm=comm,
            worker=worker,
            synchronizer=Synchronizer(self._make_average(flat), comm, check_every=config.sync.check_every),
            period=period,
            learning_rate=learning_rate,
            evaluator=evaluator,
            watch=watch,
            checkpoints=checkpoints,
            claim=claim,
            recorder=recorder,
            stop_request=stop_request,
            progress=progress,
            evaluation=config.evaluate,
        )

    def _make_average(self, flat: FlatState) -> Average:
        average = StateAverage(flat, self.comm)
        return average if self.config.sync.mode == "average" else NoAverage(average)

    def _make_reader(self) -> Reader:
        budget = machine.share_of_memory(self.comm.local_size) // 2
        mine = self.parts[self.comm.rank]
        return make_reader(mine, self.config.data, self.config.seed, self.catalog.sample.fields, budget)

    def _make_worker(self, reader: Reader) -> Worker:
        return Worker(
            reader,
            LocalStep(self.model, self.optimizer, self.task, self.config.optim),
            batch_size=self.config.data.batch_size,
            accumulate=self.config.optim.accumulate,
            samples_per_rank=[_num_rows(part) for part in self.parts],
        )

    def _make_evaluator(self) -> Evaluator:
        if not self.catalog.validation:
            return TrainingLossEvaluator()
        rows = Rows(self.catalog.validation, self.catalog.sample.fields)
        alone = self.config.sync.mode == "none"
        return ValidationEvaluator(
            self.comm, self.task, self.model, rows, self.config.evaluate.batch_size, every_model=alone
        )

    def _check_evaluation(self, evaluator: Evaluator) -> None:
        """Refuses a metric that the task does not give, and a task that cannot be evaluated. Collective."""
        names = sorted(
            {n for theirs in self.comm.allgather(together(self.comm, evaluator.try_out)) for n in theirs}
        )
        metric = self.config.evaluate.metric
        if metric not in names:
            raise ConfigError(
                f"evaluate.metric = {metric!r}: the task gives {', '.join(names)}; expected one of these.",
                agreed=True,
            )

    def _restore(self, saved: SavedCheckpoint, parts: Mapping[str, Stateful], before: Config | None) -> None:
        if self.config.sync.mode == "none":
            raise ConfigError(
                "sync.mode = 'none' cannot be resumed: a checkpoint holds one model, not one a rank."
            )
        states = saved_states(saved, self.comm.rank, parts.keys(), optional={"settings", "evaluator"})
        self.settings.load_state_dict(states.pop("settings", settings_before(before)))
        self._compare_samples(saved)
        if not self.settings.best_holds:
            states.pop("watch")
            states.pop("evaluator", None)
        if self.config.sync.optimizer_state != "average":  # then one part has all of it
            states["optimizer"] = {**states["moments"], **states["optimizer"]}
            states["moments"] = {}
        for name in ("moments", "optimizer"):
            states[name] = self._fitting(states[name], parts[name])
        restore(saved, self.model, parts, states)

    def _compare_samples(self, saved: SavedCheckpoint) -> None:
        before, now = saved.sample.to_json(), self.catalog.sample.to_json()
        unlike = [key for key in now if before.get(key) != now[key]]
        if unlike:
            raise RunDirectoryError(
                f"{saved.folder} was trained on samples with {_named(before, unlike)}; those of data.path "
                f"have {_named(now, unlike)}. Give the data that the run began with, and its data.inputs, "
                "data.targets and data.scale."
            )

    def _fitting(self, state: State, part: Stateful) -> State:
        """What the optimizer has a use for of a part of its saved state; what it lacks is as it begins."""
        if not self.settings.optimizer_holds:
            return {}
        if self.settings.arguments_hold:
            return state
        if (
            self.config.sync.optimizer_state != "average"
        ):  # it is made in the first step, as the arguments say
            return {}
        return {key: state.get(key, value) for key, value in part.state_dict().items()}

    def _refuse_if_over(self, progress: Progress, worker: Worker) -> None:
        stop = self.config.stop
        for key, done, limit in (
            ("max_rounds", progress.rounds, stop.max_rounds),
            ("max_epochs", worker.epochs, stop.max_epochs),
        ):
            if limit is not None and done >= limit:
                raise ConfigError(
                    f"stop.{key} = {limit}: the run has done {done}; expected a higher limit to go on."
                )

    def header(self, run: RunDirectory, training: LocalSGD) -> RunHeader:
        """What will run, in plain values. Collective."""
        config = self.config
        hosts = tuple(dict.fromkeys(self.comm.allgather(self.comm.host)))
        shards = [len({span.shard for span in part}) for part in self.parts]
        rules = {f.name: getattr(config.stop, f.name) for f in dataclasses.fields(config.stop)}
        return RunHeader(
            run=str(run.folder),
            round=training.progress.rounds,
            task=type(self.task).__name__ if self.task_is_given else config.task,
            model=describe(self.model),
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            world_size=self.comm.size,
            hosts=hosts,
            backend=self.comm.name,
            lost_rank="ends the job",
            stall_timeout_s=config.sync.stall_timeout_s,
            sees_signs=self.comm.size == 1 or self.comm.liveness.sees_signs,
            threads=self.threads,
            period=config.sync.period if config.sync.mode == "average" else None,
            batch_size=config.data.batch_size,
            data=config.data.path,
            shards_per_rank=shards,
            samples_per_rank=[_num_rows(part) for part in self.parts],
            validation_samples=training.evaluator.num_samples,
            metric=config.evaluate.metric,
            stop_rules={name: rule for name, rule in rules.items() if rule},
            config_hash=hashlib.sha256(repr(sorted(flatten(config).items())).encode()).hexdigest()[:16],
            task_is_given=self.task_is_given,
            versions=self.versions,
        )


def _fault(kind: str, message: str, rounds: int) -> FaultReport:
    return FaultReport(round=rounds, kind=kind, ranks=(), message=message)


def _num_rows(spans: tuple[Span, ...]) -> int:
    return sum(span.num_rows for span in spans)


def _named(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {values.get(key)!r}" for key in keys)


def _facts(catalog: Catalog) -> dict[str, Any]:
    """What all ranks must see alike: folders may be mounted elsewhere, but files and rows are the same."""
    rows = {f"rows of {Path(s.path).name} (shard {i})": s.num_samples for i, s in enumerate(catalog.shards)}
    return {
        "a sample": json.dumps(catalog.sample.to_json()),
        "training rows": _num_rows(catalog.train),
        **rows,
    }
