"""From a configuration to a training that is ready to run. The only place that names concrete classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd_train.algorithm.batch_norm import BatchNormEvaluator, training_batches
from hvd_train.algorithm.compiling import compile_in_turn
from hvd_train.algorithm.continuing import EpochResume
from hvd_train.algorithm.ema import PREFIX, Ema, EmaEvaluator
from hvd_train.algorithm.evaluate import Evaluator, TrainingLossEvaluator, ValidationEvaluator
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.left_out import LeftOut
from hvd_train.algorithm.local_sgd import LocalSGD
from hvd_train.algorithm.observer import Observer
from hvd_train.algorithm.optimizer_state import OptimizerState
from hvd_train.algorithm.period.chosen import make_period
from hvd_train.algorithm.progress import Progress
from hvd_train.algorithm.schedule import LearningRate
from hvd_train.algorithm.stopping import Watch
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.algorithm.transformed_reader import TransformedReader
from hvd_train.algorithm.worker import Worker
from hvd_train.algorithm.workers.pool import Workers, make_transformer
from hvd_train.comm.agree import together
from hvd_train.config import Config
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.epochs import EpochReader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen, damage_screen, evaluation_screen, training_screen
from hvd_train.environment import machine
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.io.output import warn
from hvd_train.io.stateful import State, Stateful
from hvd_train.preparation import Prepared, num_rows
from hvd_train.record.reports import FaultReport, Recorder, RunStart
from hvd_train.run.carry_over import carry_over
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.claim import Ownership
from hvd_train.run.directory import RunDirectory
from hvd_train.run.initial import start_from
from hvd_train.run.layout import CHECKPOINTS, anchored
from hvd_train.run.node_cache import Copies
from hvd_train.run.random_state import RandomState
from hvd_train.run.restore import restore, saved_states
from hvd_train.run.resuming import Settings, settings_before
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from hvd_train.run.signals import StopRequest
from hvd_train.starting import run_start
from hvd_train.tasks.building import first_batch
from hvd_train.tasks.standardizing import standardize

_SHARED = frozenset(("settings", "progress", "watch", "evaluator", "period", "moments", "ema", "outliers"))
"""The parts of a run that are the same on every rank."""


@dataclass(kw_only=True)
class Wiring:
    """Builds the `LocalSGD` of a prepared training."""

    prepared: Prepared
    copies: Copies = field(default_factory=Copies)
    """Of this rank's files, which are read in their place."""
    workers: Workers | None = None
    """Processes that are to transform the batches; without any this one does."""
    faults: list[FaultReport] = field(default_factory=list, init=False)
    """What a resume found, to be reported after the header."""
    reader: TransformedReader = field(init=False)
    """Of this rank's rows; made by `assemble`."""
    _epochs: EpochReader = field(init=False)
    """What `reader` draws from."""
    _sync: SyncParts = field(init=False)
    """What is averaged; made by `assemble`."""
    settings: Settings = field(init=False)
    """What a resume compares; made by `assemble`."""
    _screen: Screen | None = field(default=None, init=False)
    """What marks the rows of `reader`."""
    _init: str = field(default="", init=False)
    """What the model starts from, in words; empty for its own initial values, and in a resumed run."""
    _gradients: Gradients = field(init=False)
    """Of this rank; made by `assemble`."""
    _compile_s: Sequence[float] = field(default=(), init=False)
    """Seconds that compiling the model took on each rank."""
    _readings: Sequence[str] = field(default=(), init=False)
    """How each rank reads its rows, and why so."""
    _saved: SavedCheckpoint | None = field(default=None, init=False)
    """The checkpoint that the run goes on from; rank 0's choice."""

    def assemble(
        self, run: RunDirectory, recorder: Recorder, stop_request: StopRequest, claim: Ownership
    ) -> LocalSGD:
        """The training, restored from the run's checkpoint if it is resumed. Collective.

        Args:
            claim: this rank's part in the job's claim to the run's folder.
        """
        prepared = self.prepared
        if run.checkpoint is None:  # else it is a part of the model that is restored
            screen = damage_screen(prepared.config.data, prepared.catalog.sample)
            standardize(prepared.model, prepared.catalog, prepared.comm, screen)
        budget = machine.share_of_memory(prepared.comm.local_size) // 2
        if prepared.plan.is_shared:
            budget = min(prepared.comm.allgather(budget))
        training = together(prepared.comm, lambda: self._assemble(run, recorder, stop_request, claim, budget))
        resumed = self._go_on_in_epoch(training.worker, training.progress)
        remarks = [prepared.config.sync.remark(), self._sync.flat.remark()]
        remarks += [self._sync.lost, *self.settings.remarks, resumed]
        together(prepared.comm, self._epochs.open)
        how = f"{self._epochs.mode}: {self._epochs.why}{self.copies.words}"
        self._readings = prepared.comm.allgather(how)
        self._check_evaluation(training.evaluator)
        if prepared.config.model.compile:
            self._compile_s = compile_in_turn(prepared.comm, self._warm_up)
        training.checkpoints.prepare()
        self.faults = [_fault("checkpoint_left_out", line, training.progress.rounds) for line in run.left_out]
        if self._saved is not None:
            lost = carry_over(training.checkpoints, training.watch, self._saved)
            if lost:
                self.faults.append(_fault("best_model_lost", lost, training.progress.rounds))
        for remark in remarks if prepared.comm.rank == 0 else ():
            if remark:
                warn(remark)
        return training

    def _assemble(
        self,
        run: RunDirectory,
        recorder: Recorder,
        stop_request: StopRequest,
        claim: Ownership,
        budget: int,
    ) -> LocalSGD:
        prepared = self.prepared
        config, comm = prepared.config, prepared.comm
        sync = self._sync = SyncParts(prepared.model, prepared.optimizer, comm, config)
        self.reader = self._make_reader(budget)
        validation = [(span.shard, span.start, span.stop) for span in prepared.catalog.validation]
        self.settings = Settings(anchored(config), validation)
        progress, worker = (
            Progress(rows=prepared.plan.samples_per_part if prepared.own_epochs else ()),
            self._make_worker(self.reader),
        )
        watch = Watch(config.stop, config.evaluate.mode)
        period, evaluator = make_period(config.sync, prepared.replayed), self._make_evaluator(sync.ema)
        parts: dict[str, Stateful] = {
            "settings": self.settings,
            "progress": progress,
            "watch": watch,
            "evaluator": evaluator,
            "period": period,
            **sync.stateful(),
            **self._optimizer_parts(sync.flat),
            "worker": worker,
            "random": RandomState(config.seed, comm.rank, comm.size),
        }
        # Before the optimizer's state is restored: its rates are those of the configuration.
        learning_rate = LearningRate(config.learning_rate, prepared.optimizer)
        if run.checkpoint is not None:
            self._saved = SavedCheckpoint.open(run.checkpoint)
            self._restore(self._saved, parts, run.before)
            # A checkpoint has it only where ranks passed epochs of their own.
            progress.epoch = progress.epoch or float(worker.epochs)
            self._refuse_if_over(progress)
        elif config.model.init:
            # On every rank: what x_0 does not take from rank 0 (buffers with the policy `keep`, extra state)
            # is then the same everywhere.
            self._init = start_from(prepared.model, config.model)
        return LocalSGD(
            comm=comm,
            worker=worker,
            synchronizer=sync.synchronizer(),
            period=period,
            learning_rate=learning_rate,
            evaluator=evaluator,
            watch=watch,
            checkpoints=self._make_checkpoints(run, parts, recorder, claim, sync.ema),
            claim=claim,
            observer=self._make_observer(sync.flat),
            left_out=LeftOut(
                comm, worker, progress, self._screen, recorder, num_rows(prepared.catalog.train)
            ),
            recorder=recorder,
            stop_request=stop_request,
            progress=progress,
            evaluation=config.evaluate,
        )

    def _go_on_in_epoch(self, worker: Worker, progress: Progress) -> str:
        """Goes to where the checkpoint was in its epoch; returns what the user should know of it."""
        prepared = self.prepared
        if self._saved is None:
            return ""
        resume = EpochResume(
            comm=prepared.comm,
            worker=worker,
            reader=self._epochs,
            catalog=prepared.catalog,
            screen=self._screen,
            parts=len(prepared.plan.parts),
        )
        remark = resume.go_on(self._saved, self.settings.before, progress.epochs)
        if not worker.own_epochs:
            progress.epoch = worker.progress
        return remark

    def _optimizer_parts(self, flat: FlatState) -> dict[str, Stateful]:
        """The optimizer's state: what is averaged is the same on every rank, the rest each rank's own."""
        prepared = self.prepared
        averaged = flat.moments().keys()

        def part(shared: bool) -> OptimizerState:
            def has(name: str, _: Any) -> bool:
                return self._sync.optimizer_steps_alone and (name in averaged) is shared

            return OptimizerState(prepared.model, prepared.optimizer, has)

        return {"moments": part(shared=True), "optimizer": part(shared=False)}

    def _make_checkpoints(
        self,
        run: RunDirectory,
        parts: Mapping[str, Stateful],
        recorder: Recorder,
        claim: Ownership,
        ema: Ema,
    ) -> Checkpoints:
        prepared = self.prepared
        return Checkpoints(
            folder=run.folder / CHECKPOINTS,
            comm=prepared.comm,
            config=prepared.config.checkpoint,
            model=prepared.model,
            parts=parts,
            shared=_SHARED,
            sample=prepared.catalog.sample,
            recorder=recorder,
            claim=claim,
            ema=ema,
        )

    def _make_observer(self, flat: FlatState) -> Observer:
        prepared = self.prepared
        return Observer(
            prepared.comm,
            flat,
            prepared.host_of_rank,
            layers=prepared.config.sync.mode != "none",
            every_step=prepared.config.sync.mode == "gradients",
            enabled=prepared.config.record.observe,
        )

    def _make_reader(self, budget: int) -> TransformedReader:
        prepared = self.prepared
        config, sample = prepared.config, prepared.catalog.sample
        self._screen = training_screen(config.data, sample)
        self._epochs = prepared.plan.reader(budget, self._screen, self.copies.paths)
        return TransformedReader(
            self._epochs,
            make_transformer(self.workers, prepared.task, config, sample),
            Numbering(prepared.catalog.shards),
            batch_size=config.data.batch_size * prepared.plan.sharing,
            last_batch=config.data.last_batch,
            share=prepared.plan.share,
        )

    def _make_worker(self, reader: TransformedReader) -> Worker:
        prepared = self.prepared
        rows = prepared.config.data.batch_size if prepared.config.model.compile else None
        self._gradients = Gradients(prepared.model, prepared.task, prepared.config.optim, compiled_rows=rows)
        return Worker(
            reader,
            self._sync.step(self._gradients),
            batch_size=prepared.config.data.batch_size * prepared.plan.sharing,
            last_batch=prepared.config.data.last_batch,
            accumulate=prepared.config.optim.accumulate,
            samples_per_rank=prepared.plan.samples_per_part,
            own_epochs=prepared.own_epochs,
        )

    def _warm_up(self) -> None:
        """The rows are the same on every rank, so that their first is the one to compile on any host."""
        prepared = self.prepared
        config = prepared.config
        batch = first_batch(prepared.task, prepared.catalog, config.data.batch_size, config.seed)
        self._gradients.warm_up(batch)

    def _make_evaluator(self, ema: Ema) -> Evaluator:
        prepared, evaluator = self.prepared, self._plain_evaluator(ema)
        config = prepared.config
        if not config.evaluate.batch_norm_batches:
            return evaluator
        batches = training_batches(prepared.catalog, config, prepared.task, prepared.comm, self.copies.paths)
        return BatchNormEvaluator(evaluator, prepared.comm, prepared.task, prepared.model, batches)

    def _plain_evaluator(self, ema: Ema) -> Evaluator:
        prepared = self.prepared
        if not prepared.catalog.validation:
            return TrainingLossEvaluator()
        sample, copies = prepared.catalog.sample, self.copies.paths
        screen = evaluation_screen(prepared.config.data, sample)
        shards = prepared.catalog.shards
        rows = Rows(prepared.catalog.validation, sample.fields, screen=screen, known=shards, copies=copies)
        sync, watched = prepared.config.sync, prepared.config.evaluate.metric
        evaluator = ValidationEvaluator(
            prepared.comm,
            prepared.task,
            prepared.model,
            rows,
            batch_size=prepared.config.evaluate.batch_size,
            every_model=sync.mode == "none",
            watched=watched.removeprefix(PREFIX) if sync.ema else watched,
        )
        return EmaEvaluator(evaluator, ema) if sync.ema else evaluator

    def _check_evaluation(self, evaluator: Evaluator) -> None:
        """Refuses a metric that the task does not give, and a task that cannot be evaluated. Collective."""
        prepared = self.prepared
        by_rank = prepared.comm.allgather(together(prepared.comm, evaluator.try_out))
        names = sorted({name for names in by_rank for name in names})
        metric = prepared.config.evaluate.metric
        if metric not in names:
            raise ConfigError(
                f"evaluate.metric = {metric!r}: the task gives {', '.join(names)}; expected one of these.",
                agreed=True,
            )

    def _restore(self, saved: SavedCheckpoint, parts: Mapping[str, Stateful], before: Config | None) -> None:
        prepared = self.prepared
        if prepared.config.sync.mode == "none":
            raise ConfigError(
                "sync.mode = 'none' cannot be resumed: a checkpoint holds one model, not one per rank."
            )
        optional = {"settings", "evaluator", "buffers", "ema", "outer", "outliers", "sliced"}
        states = saved_states(saved, prepared.comm.rank, parts.keys() | {"sliced"}, optional)
        self.settings.load_state_dict(states.pop("settings", settings_before(before)))
        self._compare_samples(saved)
        if not self.settings.schedule_holds:
            states.pop("period")
        if not self.settings.best_holds:
            states.pop("watch")
            states.pop("evaluator", None)
        self._sync.goes_on(saved.round)
        self._sync.divide(states)
        for name in ("moments", "optimizer"):
            states[name] = self._fitting(states[name], parts[name])
        holds = self.settings.optimizer_holds and self.settings.arguments_hold
        self._sync.restore(saved, states, optimizer_holds=holds)
        restore(saved, prepared.model, parts, states)

    def _compare_samples(self, saved: SavedCheckpoint) -> None:
        before, now = (s.contents() for s in (saved.sample, self.prepared.catalog.sample))
        unnamed = {"names"} - (before.keys() & now.keys())  # where one says nothing, they do not differ
        every = [key for key in {**before, **now} if key not in unnamed]
        unlike = [key for key in every if before.get(key) != now.get(key)]
        if unlike:
            raise RunDirectoryError(
                f"{saved.folder} was trained on samples with {_named(before, unlike)}; those of data.path "
                f"have {_named(now, unlike)}. Give the data that the run began with, and all that its "
                "configuration says of a sample under `data`."
            )

    def _fitting(self, state: State, part: Stateful) -> State:
        """The part of the saved state that fits the optimizer; missing entries keep their initial values."""
        if not self.settings.optimizer_holds:
            return {}
        if self.settings.arguments_hold:
            return state
        if not self._sync.flat.has_moments:
            return {}  # it is made in the first step, as the arguments say
        return {key: state.get(key, value) for key, value in part.state_dict().items()}

    def _refuse_if_over(self, progress: Progress) -> None:
        stop = self.prepared.config.stop
        for key, done, limit in (
            ("max_rounds", progress.rounds, stop.max_rounds),
            ("max_epochs", progress.epochs, stop.max_epochs),
        ):
            if limit is not None and done >= limit:
                raise ConfigError(
                    f"stop.{key} = {limit}: the run has done {done}; expected a higher limit to go on."
                )

    def header(self, run: RunDirectory, training: LocalSGD) -> RunStart:
        """What will run, in plain values."""
        return run_start(self.prepared, run.folder, training, self._init, self._compile_s, self._readings)


def _fault(kind: str, message: str, rounds: int) -> FaultReport:
    return FaultReport(round=rounds, kind=kind, ranks=(), message=message)


def _named(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {values.get(key)!r}" for key in keys)
