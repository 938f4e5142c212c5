"""Measures what a training takes in memory, on its model and its data. Loads torch."""

from __future__ import annotations

import gc
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_train.algorithm.batch_norm import require_batch_norm
from hvd_train.algorithm.early_bucket import early_parameters
from hvd_train.algorithm.flat_state import Entry, FlatState
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import LocalStep, make_optimizer
from hvd_train.algorithm.outer import make_rule
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config
from hvd_train.data.batches import largest_batch
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.data.rows import Rows
from hvd_train.data.windows import BLOCK_BYTES, WINDOW_BLOCKS
from hvd_train.run.model_state import saved_state
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.building import build, first_rows
from hvd_train.tasks.built_in import takes_tokens
from hvd_train.tasks.load import make_task
from hvd_train.tasks.models import evaluating
from hvd_train.tasks.parameters import freeze
from hvd_train.tasks.transforming import transform_of
from hvd_train.tools.doctor.memory import Need

_SIDE, _LAYERS = 64, 4
"""Of the square matrices that stand for the parameters of a model which is not there."""

_ROWS = 8
"""Rows that a forward pass is tried on: with half of them it is a line through two points."""


def of(config: Config, parameters: int | None) -> Need:
    """Of a model of so many float32 parameters under the optimizer of `config`, or of its own model; with the
    data of `config` in both cases.

    Raises `UserError` if model or data cannot be used.
    """
    task = make_task(config)
    catalog = open_catalog(config.data, tokens=takes_tokens(task))
    if parameters is None:
        model = build(task, catalog)
        freeze(model, config.model.freeze)
        if config.evaluate.batch_norm_batches:
            require_batch_norm(model)
        found = _of_model(model, config)
        count = found.words
        found = replace(found, activation_bytes=_activations(task, catalog, config))
    else:
        bare = replace(config, optim=replace(config.optim, groups=()))  # of names that it does not have
        layers = nn.Sequential(*(nn.Linear(_SIDE, _SIDE, bias=False) for _ in range(_LAYERS)))
        found = _times(_of_model(layers, bare), parameters / (_LAYERS * _SIDE**2))
        count = f"{parameters:,} parameters"
    rows = Rows(catalog.train, catalog.sample.fields)
    return replace(
        found,
        words=count,
        data_bytes=len(rows) * rows.row_bytes,
        window_bytes=2 * WINDOW_BLOCKS * max(BLOCK_BYTES, rows.row_bytes),
        reading=config.data.reading,
        order=config.data.order,
    )


def of_process() -> tuple[int, int]:
    """Bytes that this process has to itself, and bytes of files that it maps; after a step of training, which
    loads more of torch."""
    _try_step()
    gc.collect()
    text = Path("/proc/self/status").read_text()
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    return found["RssAnon"], found["RssFile"]


def _of_model(model: nn.Module, config: Config) -> Need:
    optimizer, comm, sync = make_optimizer(model, config.optim), SoloCommunicator(), config.sync
    whole = FlatState(model, optimizer, comm, batch_norm=sync.batch_norm)
    every_step = sync.mode == "gradients"
    slices = every_step or sync.schedule == "warmup"
    early = early_parameters(model, config.optim) if every_step else ()
    flat = SyncParts(model, optimizer, comm, config).flat  # refuses what a run refuses
    kept = whole.num_bytes - flat.num_bytes
    apart = [e for e in flat.entries if e.kind == "moment" and e.part.every > 1]
    parameters = sum(_wide_bytes(e) for e in flat.entries if e.kind == "parameter")
    moments = sum(_wide_bytes(e) for e in whole.entries if e.kind == "moment")
    return Need(
        words=f"{sum(p.numel() for p in model.parameters()):,} parameters",
        state_bytes=flat.num_bytes,
        gradient_bytes=sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad),
        own_bytes=(0 if every_step else kept) + sum(_num_bytes(t) for _, t in flat.frozen()),
        model_bytes=sum(map(_num_bytes, saved_state(model)[0].values())),
        ema_bytes=sum(_wide_bytes(e) for e in flat.entries if e.kind != "moment") if sync.ema else 0,
        outer_bytes=_outer_bytes(parameters, config),
        stepped_bytes=parameters if slices else 0,
        sliced_moment_bytes=moments if slices else 0,
        staged_bytes=sum(model.get_parameter(name).nbytes for name in early),
        averaged_moment_bytes=sum(map(_num_bytes, flat.moments().values())),
        own_moment_bytes=(kept if flat.has_moments or sync.optimizer_state == "keep" else 0)
        + sum(_num_bytes(e.holder) for e in apart),
        wide_bytes=sum(4 * math.prod(e.size) for e in flat.entries if e.dtype.itemsize < 4),
    )


def _outer_bytes(parameters: int, config: Config) -> int:
    rule = make_rule(config.sync)
    return 0 if rule is None else 2 * len(rule.keeps) * parameters


def _wide_bytes(entry: Entry) -> int:
    return max(4, entry.dtype.itemsize) * math.prod(entry.size)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _times(need: Need, factor: float) -> Need:
    numbers: dict[str, Any] = {
        name: math.ceil(value * factor) for name, value in vars(need).items() if isinstance(value, int)
    }
    return replace(need, **numbers)


def _activations(task: Task, catalog: Catalog, config: Config) -> int:
    """Bytes of a batch and what a pass on it makes: of a few rows, and from there along a line to all."""
    model = build(task, catalog)
    freeze(model, config.model.freeze)
    few = first_rows(catalog.train, catalog, _ROWS)
    rows = len(next(iter(few.values())))
    half = {name: value[: max(1, rows // 2)] for name, value in few.items()}
    # The gradients of what is kept are at most as large again.
    largest = largest_batch(config.data.batch_size, config.data.last_batch)
    trained = 2 * _at(largest, rows, _kept(task, model, half), _kept(task, model, few))
    if not catalog.validation:
        return trained
    evaluated = _at(config.evaluate.batch_size, rows, _passed(task, model, half), _passed(task, model, few))
    return max(trained, evaluated)


def _at(batch_size: int, rows: int, half: int, whole: int) -> int:
    """What a batch takes, of which `rows` take `whole`, and half of them `half`."""
    each = max(0, whole - half) / max(1, rows - max(1, rows // 2))
    return math.ceil(max(0, whole + each * (batch_size - rows)))


def _kept(task: Task, model: nn.Module, batch: Batch) -> int:
    """Bytes of a batch and of what autograd keeps of its forward pass, without the parameters."""
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(model, transform_of(task)(dict(batch)))
    del loss
    return sum(kept.values()) + sum(map(_num_bytes, batch.values()))


def _passed(task: Task, model: nn.Module, batch: Batch) -> int:
    """Bytes of a batch and of the largest input and output of a module in an evaluation of it."""
    largest = 0

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(map(_num_bytes, tensors)))

    hooks = [module.register_forward_hook(measure) for module in model.modules()]
    with evaluating(model):
        task.loss(model, transform_of(task)(dict(batch)))
    for hook in hooks:
        hook.remove()
    return largest + sum(map(_num_bytes, batch.values()))


class _Tiny(Task):
    def build_model(self, spec: object) -> nn.Module:
        return nn.Linear(_SIDE, _SIDE)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return model(batch["x"]).square().mean(), len(batch["x"])


def _try_step() -> None:
    task, config = _Tiny(), Config()
    model = task.build_model(None)
    gradients = Gradients(model, task, config.optim)
    LocalStep(gradients, make_optimizer(model, config.optim), config.optim)([{"x": torch.ones(2, _SIDE)}])
