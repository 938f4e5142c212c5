"""A task's model, ready to be trained: made, complete, of tensors that can be saved, fit for its batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hvd_train.data.catalog import Catalog
from hvd_train.data.deal import Span
from hvd_train.data.format import SampleSpec
from hvd_train.data.rows import Rows
from hvd_train.data.screen import MARK, Screen
from hvd_train.environment import machine
from hvd_train.errors import ConfigError, TaskError
from hvd_train.run.model_state import saved_state
from hvd_train.run.random_state import generators_as_they_are
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.built_in import is_built_in, takes_tokens
from hvd_train.tasks.draws import Draws
from hvd_train.tasks.inputs import constant_buffers
from hvd_train.tasks.models import describe, evaluating
from hvd_train.tasks.transforming import transform_of

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
"""What torch says of a tensor that is too large."""

_ROWS = 2
"""Rows that are passed through lazy modules: enough for any shape, and the same on every rank."""


def build(task: Task, catalog: Catalog) -> nn.Module:
    """The model of `task` in training mode. Modules that were put into evaluation mode inside a model that is
    in training mode stay so. Not collective; draws from torch's global generator.

    Lazy modules get their shapes from a forward pass on the first rows, in evaluation mode.

    Raises `TaskError` for a result that is not a module, stays lazy, or cannot be saved; `ConfigError` where
    the inputs are to be standardized, which the model of this task does not do.
    """
    model = _new_model(task, catalog.sample)
    if not isinstance(model, nn.Module):
        raise TaskError(
            f"build_model of {type(task).__name__} returned {model!r}; expected a torch.nn.Module."
        )
    if _lazy(model):
        _initialise(model, task, catalog)
    saved_state(model)
    _require_standardizing(task, model, catalog.sample)
    return model if model.training else model.train()


def _new_model(task: Task, sample: SampleSpec) -> nn.Module:
    """A new model. Raises `TaskError` for one that does not fit into memory; a built-in one is measured
    first, as the kernel may promise memory that it does not have."""
    where = f"build_model of {type(task).__name__}"
    try:
        if is_built_in(task):
            with torch.device("meta"):
                sketch = task.build_model(sample)
            numbers = [(p.numel(), p.numel() * p.element_size()) for p in sketch.parameters()]
            count, num_bytes = map(sum, zip(*numbers, strict=True))
            available = machine.available_memory()
            if num_bytes > available:
                raise TaskError(
                    f"the model {describe(sketch)} has {count:,} parameters in {num_bytes:,} bytes; expected "
                    f"at most {available:,}, what is free here. Choose smaller widths under `model`."
                )
        return task.build_model(sample)
    except (RuntimeError, MemoryError) as error:
        said = str(error).partition("\n")[0]
        if isinstance(error, MemoryError) or any(words in said for words in _OUT_OF_MEMORY):
            raise TaskError(
                f"{where} ran out of memory: {said}. Expected a model that fits. Make it smaller."
            ) from None
        raise


def _require_standardizing(task: Task, model: nn.Module, sample: SampleSpec) -> None:
    if not sample.standardize or constant_buffers(model):
        return
    if takes_tokens(task):
        why, remedy = "the task next-token, whose inputs are tokens", "Leave it out."
    else:
        why = "a model of your own: only those of the tasks classification and regression do it"
        remedy = "Subtract the mean and divide by the deviation in the `transform` of your task."
    raise ConfigError(f"data.standardize = {sample.standardize!r}: expected none with {why}. {remedy}")


def _lazy(model: nn.Module) -> list[str]:
    """The parameters and buffers that have no shape yet."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [name for name, tensor in tensors.items() if nn.parameter.is_lazy(tensor)]


def _initialise(model: nn.Module, task: Task, catalog: Catalog) -> None:
    with evaluating(model):
        task.loss(model, transform_of(task)(first_rows(catalog.train, catalog, _ROWS)))
    if left := _lazy(model):
        raise TaskError(
            f"`{left[0]}` has no shape: its module is lazy, and a forward pass in evaluation mode did not "
            "reach it. Give the module its sizes in build_model, or call the model there once."
        )


def first_rows(spans: Sequence[Span], catalog: Catalog, count: int) -> Batch:
    """The first `count` rows of `spans`, or as many as there are, as a reader gives them; for what depends on
    shapes alone: rows that cannot be read are zeros."""
    rows = Rows(spans, catalog.sample.fields, screen=Screen(catalog.sample, on_damage="skip"))
    try:
        arrays = rows.read(0, min(count, len(rows)))
    finally:
        rows.close()
    del arrays[MARK]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def first_batch(task: Task, catalog: Catalog, count: int, seed: int) -> Batch:
    """The first `count` rows for training, or as many as there are, transformed as in the first epoch. The
    random generators are as before it."""
    batch = first_rows(catalog.train, catalog, count)
    rows = range(len(next(iter(batch.values()))))
    with generators_as_they_are():
        return transform_of(task)(batch, Draws(seed, 0, rows))


def refuse_single_rows(
    model: nn.Module, task: Task, catalog: Catalog, part: Sequence[Span], why: str
) -> None:
    """Raises `TaskError` if `model` has a norm that cannot train on one row of `part`: a rank will draw
    batches of one, because of `why`. Convolutional norms, which see many values per channel in one row, can.
    Not collective.
    """
    norms: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, _NORMS)}
    if not norms or not part:
        return
    entered: list[nn.Module] = []
    hooks = [norm.register_forward_pre_hook(lambda module, _: entered.append(module)) for norm in norms]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            task.loss(model, transform_of(task)(first_rows(part, catalog, 1)))
    except ValueError as error:
        if "more than 1" not in str(error) or not entered:
            raise
        norm = entered[-1]
        raise TaskError(
            f"`{norms[norm]}` ({type(norm).__name__}) cannot train on a batch of one row, but {why}."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in before:  # training mode moves running statistics
            buffer.copy_(value)
