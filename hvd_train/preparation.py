"""What a training needs before its folder is opened: the task, the data, the model of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.comm.agree import require_equal, together
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import versions
from hvd_train.config import Config, DataConfig, SyncConfig, flatten
from hvd_train.config_values import require
from hvd_train.data import remarks
from hvd_train.data.catalog import Catalog, make_catalog, summarize_inputs, summarize_labels
from hvd_train.data.deal import Span
from hvd_train.data.header_labels import header_labels
from hvd_train.data.labels import IGNORED
from hvd_train.data.python import registry
from hvd_train.data.python.facts import reading_lines
from hvd_train.data.readers.plan import ReadingPlan
from hvd_train.data.screen import damage_screen
from hvd_train.data.survey import Survey, join_surveys, survey
from hvd_train.environment import machine
from hvd_train.environment.binding import CoreBinding, complaints, core_binding
from hvd_train.environment.launcher import detect, forgotten_tasks
from hvd_train.errors import TaskError
from hvd_train.io.output import warn
from hvd_train.liveness import phase
from hvd_train.run.model_state import saved_state
from hvd_train.run.random_state import seed_rank
from hvd_train.run.replay import Stretch, periods_of
from hvd_train.run.shards import find_shards_together
from hvd_train.tasks.base import Task
from hvd_train.tasks.building import build, refuse_single_rows
from hvd_train.tasks.built_in import takes_tokens, targets_of
from hvd_train.tasks.load import make_task
from hvd_train.tasks.models import scales_integers
from hvd_train.tasks.parameters import freeze


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training before it has a folder; on this rank."""

    config: Config
    comm: Communicator
    task: Task
    task_is_given: bool
    """Whether the caller gave it, rather than the configuration's name of it."""
    versions: dict[str, str]
    threads: list[int]
    """Of torch, by rank."""
    hosts: tuple[str, ...]
    """Names of the hosts, each once, in the order of their first ranks."""
    host_of_rank: list[int]
    """The index in `hosts` of each rank's host."""
    catalog: Catalog
    plan: ReadingPlan
    """Which rank reads which of its training rows."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    surveys: dict[str, Survey]
    """What the values of the training rows are, by dataset; empty on every rank but 0."""
    remarks: list[str]
    """What looks wrong in them, one sentence each; empty on every rank but 0."""
    replayed: tuple[Stretch, ...]
    """The periods of `sync.replay_periods`: see `periods_of`; empty without it."""
    own_epochs: bool
    """Whether every rank passes epochs of its own: with the schedule `time`, and where such a run is
    replayed."""


def prepare(config: Config, task: Task | None, comm: Communicator) -> Prepared:
    """What a training needs before its folder is opened: task, data, model and optimizer of this rank. What
    must agree is compared, and what fails on one rank fails on all with one message. Collective."""
    phase("set-up")
    require_equal(comm, "configurations", flatten(config), "Give every rank the same file and flags.")
    its_versions = versions(comm)
    replayed = _replayed(config, comm)
    own_epochs = isinstance(replayed[0][1], tuple) if replayed else config.sync.schedule == "time"
    if own_epochs and replayed:
        why = "in a replay of a run with sync.schedule = 'time'"
        together(comm, lambda: config.require_own_rows(why))
        together(comm, lambda: _refuse_warm_up(config.sync))
    bindings = share_cores(config.threads, comm)
    hosts = tuple(dict.fromkeys(binding.host for binding in bindings))
    chosen = together(comm, lambda: make_task(config) if task is None else task)
    catalog = _open_catalog(config.data, chosen, comm)
    for line in catalog.warnings if comm.rank == 0 else ():
        warn(line)
    plan = ReadingPlan(
        catalog=catalog, data=config.data, seed=config.seed, rank=comm.rank, world_size=comm.size
    )
    together(comm, lambda: registry.hold((*plan.parts[comm.rank % len(plan.parts)], *catalog.validation)))
    parts = catalog.parts(comm.size, config.data.batch_size) if plan.is_shared else plan.parts
    model, optimizer = together(comm, lambda: _build(config, chosen, catalog, parts[comm.rank], comm.rank))
    shapes = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in saved_state(model)[0].items()}
    require_equal(comm, "models", shapes, "The task must build the same model on every rank.")
    surveys = _survey(config.data, chosen, catalog, parts, comm)
    found = together(
        comm, lambda: _remarks(config.data, chosen, model, catalog, parts, surveys) if surveys else []
    )
    for line in found:
        warn(line)
    seed_rank(config.seed, comm.rank)
    return Prepared(
        config=config,
        comm=comm,
        task=chosen,
        task_is_given=task is not None,
        versions=its_versions,
        threads=[binding.threads for binding in bindings],
        hosts=hosts,
        host_of_rank=[hosts.index(binding.host) for binding in bindings],
        catalog=catalog,
        plan=plan,
        model=model,
        optimizer=optimizer,
        surveys=surveys,
        remarks=found,
        replayed=replayed,
        own_epochs=own_epochs,
    )


def _refuse_warm_up(sync: SyncConfig) -> None:
    """Of a replay in which the ranks take different numbers of local steps."""
    require(
        sync.schedule != "warmup",
        "sync.schedule",
        sync.schedule,
        "'fixed' in a replay of a run with sync.schedule = 'time', whose ranks take different numbers of "
        "local steps",
    )


def _replayed(config: Config, comm: Communicator) -> tuple[Stretch, ...]:
    """The periods of the run whose periods are replayed, which rank 0 reads. Collective."""
    run = config.sync.replay_periods
    if not run:
        return ()
    mine = together(comm, lambda: periods_of(run, comm.size) if comm.rank == 0 else ())
    return tuple(comm.broadcast(mine))


def share_cores(wanted: int, comm: Communicator) -> list[CoreBinding]:
    """Sets torch's threads on this rank, to `wanted` or, with 0, to its share of the cores; returns them and
    the cores of every rank. Warns of slow core bindings. Collective."""
    cores = comm.allgather((comm.host, machine.AFFINITY))
    of_host = [mask for host, mask in cores if host == comm.host]
    threads = wanted or machine.threads_for(machine.AFFINITY, of_host, machine.cpu_limit())
    torch.set_num_threads(threads)
    bindings = comm.allgather(core_binding(comm.rank, comm.host, threads))
    launcher = detect()
    warnings = [forgotten_tasks(), *map(str, complaints(bindings, launcher.unbind, launcher.deals_cores))]
    for line in warnings if comm.rank == 0 else ():
        if line:
            warn(line)
    return bindings


def _open_catalog(data: DataConfig, task: Task, comm: Communicator) -> Catalog:
    """Finds the shards; each rank reads the labels of its part, and its inputs where the scale asks for it.
    Collective."""
    tokens = takes_tokens(task)
    read = header_labels(data, tokens=tokens)
    shards = find_shards_together(data, comm, read)
    counted = targets_of(task, shards.sample) != "quantities"
    infos = (*shards.train, *shards.validation) if counted and comm.rank == 0 else ()
    for line in reading_lines(infos, shards.sample.targets):
        warn(line)
    mine = together(
        comm,
        lambda: summarize_labels(shards, comm.rank, comm.size, tokens=tokens, read=read, counted=counted),
    )
    labels = comm.allgather(mine)
    values = together(comm, lambda: summarize_inputs(shards, data, comm.rank, comm.size, tokens=tokens))
    inputs = comm.allgather(values)
    return together(comm, lambda: make_catalog(shards, data, labels, inputs, tokens=tokens))


def _build(
    config: Config, task: Task, catalog: Catalog, mine: tuple[Span, ...], rank: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer of this rank, whose rows are `mine`. Not collective."""
    torch.manual_seed(config.seed)
    try:
        model = build(task, catalog)
    except TaskError as error:
        # Of what the samples are, by their first file.
        raise TaskError(f"{catalog.shards[0].path}: {error}") from None
    freeze(model, config.model.freeze)
    if config.data.batch_size == 1:
        why = "data.batch_size is 1. Give batches of 2 rows or more"
        refuse_single_rows(model, task, catalog, mine, why)
    elif num_rows(mine) == 1:
        why = f"rank {rank} has no other row. Use fewer ranks"
        refuse_single_rows(model, task, catalog, mine, why)
    return model, make_optimizer(model, config.optim)


def _survey(
    data: DataConfig, task: Task, catalog: Catalog, parts: Sequence[tuple[Span, ...]], comm: Communicator
) -> dict[str, Survey]:
    """What the values of the training rows are, from some rows of each rank; on rank 0. Collective."""
    sample = catalog.sample
    fills = {sample.targets: IGNORED} if targets_of(task, sample) == "classes" else {}
    screen = damage_screen(data, sample)
    mine = together(comm, lambda: survey(parts[comm.rank], sample.fields, fills=fills, screen=screen))
    every = comm.allgather(mine)
    return join_surveys(every) if comm.rank == 0 else {}


def _remarks(
    data: DataConfig,
    task: Task,
    model: nn.Module,
    catalog: Catalog,
    parts: Sequence[tuple[Span, ...]],
    surveys: dict[str, Survey],
) -> list[str]:
    """What looks wrong in the values, for this task and model."""
    sample = catalog.sample
    integers: remarks.Integers = "tokens" if takes_tokens(task) else "unknown"
    if scales_integers(model):
        known = data.scale is not None or catalog.shards[0].scale is not None
        integers = "standardized" if data.standardize else "scaled" if known else "unscaled"
    floats = type(task).transform is Task.transform and not data.standardize
    kind = targets_of(task, sample)
    num_classes = (sample.num_classes or 0) if kind == "classes" else 0
    lines = [
        *remarks.of_inputs(surveys[sample.inputs], integers, floats=floats, policy=data.not_finite),
        *remarks.of_targets(
            surveys[sample.targets],
            kind,
            catalog.labels,
            num_classes,
            masked=bool(sample.mask or sample.weights),
            policy=data.not_finite,
        ),
        *(
            remarks.not_finite(found, data.not_finite)
            for name, found in surveys.items()
            if name != sample.targets
        ),
    ]
    if kind == "classes" and data.path != "digits":  # whose two shards are split by class on purpose
        lines.append(remarks.alone(parts, catalog.shards))
    return [line for line in dict.fromkeys(lines) if line]


def num_rows(spans: tuple[Span, ...]) -> int:
    """Rows of one part."""
    return sum(span.num_rows for span in spans)
