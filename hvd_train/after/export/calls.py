"""How a task calls its model, and what of the task's preprocessing can be a part of the model."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hvd_train.after.export.compare import same_bits
from hvd_train.after.trained import Trained
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.models import scales_integers
from hvd_train.tasks.transforming import transform_of


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model by the task's loss."""

    args: tuple[Any, ...]

    kwargs: dict[str, Any]

    outputs: list[Tensor]
    """The tensors that the model returned, in order."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those in the arguments, in order."""
        return tensors_of((self.args, self.kwargs))


def call_of(task: Task, model: nn.Module, batch: Batch) -> Call:
    """The first call of `model` that the loss of `batch` makes, without gradients. Raises `TaskError` if it
    makes none, or fails."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returned: list[list[Tensor]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not given:
            given.append(_copied((args, kwargs)))

    def after(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        if not returned:
            returned.append(_copied(tensors_of(outputs)))

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    where = f"loss of {type(task).__name__}"
    try:
        with torch.no_grad():
            task.loss(model, transform_of(task)(dict(batch)))
    except Exception as error:  # of the user's code, or of torch
        raise TaskError(
            f"{where} fails on the samples for the comparison: {type(error).__name__}: {error}. Give others "
            "by --data."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not returned:
        raise TaskError(f"{where} does not call the model itself; expected model(...). Call it in the loss.")
    return Call(args=given[0][0], kwargs=given[0][1], outputs=returned[0])


def _copied(values: Any) -> Any:
    """With copies of the tensors: the model or the loss may change them in place."""

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tree_map(copied, values)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors in what a model returns or takes, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, kw_only=True)
class Traceable:
    """A module of which a graph can be made."""

    module: nn.Module

    names: tuple[str, ...]
    """Of its inputs."""

    feed: Callable[[Batch, Call], tuple[Tensor, ...]]
    """Its inputs for a batch as it was read, whose call of the model is given."""

    included: tuple[str, ...]
    """Preprocessing that is a part of it."""

    left_out: tuple[str, ...]
    """Preprocessing that is not."""


@final
class _Prepared(nn.Module):
    """A model behind the transform of its task: from inputs as they are in a shard."""

    def __init__(self, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._prepare = prepare

    def forward(self, inputs: Tensor) -> Any:
        return self.model(self._prepare(inputs))


def _transform_of(task: Task, name: str, like: Batch, fill: int) -> Callable[[Tensor], Tensor]:
    """What the transform makes of the inputs, from them alone: every other dataset is filled with `fill`."""
    transform = transform_of(task)
    others = {key: value[:0] for key, value in like.items() if key != name}

    def prepare(inputs: Tensor) -> Tensor:
        filled = {
            key: torch.full((inputs.shape[0], *value.shape[1:]), fill, dtype=value.dtype)
            for key, value in others.items()
        }
        return transform({name: inputs, **filled})[name]

    return prepare


def traceable(trained: Trained, model: nn.Module, batch: Batch) -> list[Traceable]:
    """What to make a graph of: the model behind its transform where that works on inputs alone, then, if no
    graph can be made of that, the model by itself.

    Raises `TaskError` for a model that is not called with tensors alone.
    """
    task, name = trained.task, trained.saved.sample.inputs
    call = call_of(task, model, batch)
    if not call.args or call.kwargs or not all(isinstance(value, Tensor) for value in call.args):
        raise TaskError(
            f"loss of {type(task).__name__} calls the model with {_describe(call)}; expected tensors as "
            "positional arguments, which a graph can have as its inputs. Change the call, or take "
            "--format safetensors."
        )
    inside = model_scaling(trained, model)
    names, as_read = names_of(model, call), _same(call.args, batch[name])
    alone = Traceable(
        module=model,
        names=(name,) if as_read else names,
        feed=lambda _, call: call.args,
        included=inside,
        left_out=_not_carried(task, names),
    )
    if not transforms(task):
        return [alone]
    why = _unfit(task, name, batch, call)
    if why:
        return [without(alone, why)]
    prepared = Traceable(
        module=_Prepared(model, _transform_of(task, name, batch, fill=0)).eval(),
        names=(name,),
        feed=lambda batch, _: (batch[name],),
        included=(f"the transform of {type(task).__name__}", *inside),
        left_out=(),
    )
    return [prepared, alone]


def without(alone: Traceable, why: str) -> Traceable:
    """The same, with the reason why preprocessing is left out."""
    return replace(alone, left_out=tuple(f"{line}: {why}" for line in alone.left_out))


def transforms(task: Task) -> bool:
    """Whether the task has a transform of its own."""
    return type(task).transform is not Task.transform


def model_scaling(trained: Trained, model: nn.Module) -> tuple[str, ...]:
    """The preprocessing that a built-in model does itself, in words."""
    sample = trained.saved.sample
    if sample.standardize:
        of = "all values" if sample.standardize == "all" else f"each {sample.standardize}"
        return (f"inputs minus the mean of {of}, divided by the deviation",)
    if not scales_integers(model) or "float" in sample.fields[sample.inputs].dtype or sample.scale == 1:
        return ()
    return (f"integer inputs are multiplied by {sample.scale:.6g}",)


def _not_carried(task: Task, names: tuple[str, ...]) -> tuple[str, ...]:
    if not transforms(task):
        return ()
    return (f"the transform of {type(task).__name__} (apply it before {', '.join(names)})",)


def _unfit(task: Task, name: str, batch: Batch, call: Call) -> str:
    """Why the transform cannot be a part of the graph; empty if nothing is known that prevents it."""
    for fill in (0, 1):
        try:
            alone = _transform_of(task, name, batch, fill)(batch[name].clone())
        except Exception as error:  # of the user's code
            return short(error)
        if not isinstance(alone, Tensor) or not _same(call.args, alone):
            return "from the inputs alone it does not give what the loss calls the model with"
    return ""


def _same(args: tuple[Any, ...], inputs: Tensor) -> bool:
    """Whether a model was called with `inputs` and nothing else."""
    return len(args) == 1 and isinstance(args[0], Tensor) and same_bits(args[0], inputs)


def names_of(model: nn.Module, call: Call) -> tuple[str, ...]:
    """The names of `call.tensors`, by the model's forward."""
    try:
        bound = inspect.signature(model.forward).bind_partial(*call.args).arguments
    except (TypeError, ValueError):
        bound = {}
    found = [name for name, value in {**bound, **call.kwargs}.items() if isinstance(value, Tensor)]
    if len(found) != len(call.tensors):
        return tuple(f"input_{i}" for i in range(len(call.tensors)))
    return tuple(found)


def _describe(call: Call) -> str:
    given = [type(value).__name__ for value in call.args]
    return ", ".join([*given, *(f"{k}={type(v).__name__}" for k, v in call.kwargs.items())]) or "nothing"


def short(error: BaseException) -> str:
    """The reason in an error of torch, which may have many lines, in one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r'For more information, run with TORCH_LOGS="[^"]*"\.?', "", str(error))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    said = textwrap.shorten(" ".join(lines[:2]), 240, placeholder=" ...").rstrip(".:")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
