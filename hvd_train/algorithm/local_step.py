"""One local step: the optimizer that the configuration names, and what happens between two of its steps."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import StepDone
from hvd_train.algorithm.optimizer_state import densifies, sparse_parameters
from hvd_train.algorithm.parameter_groups import parameter_groups
from hvd_train.config import OptimConfig
from hvd_train.errors import ConfigError, TaskError
from hvd_train.tasks.base import Batch

_UNUSABLE = {
    "LBFGS": "it evaluates the loss several times a step",
}
_SGD_DEFAULTS = {"momentum": 0.9, "nesterov": True}


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer `config.name` over the parameters of `model` that require a gradient.

    Not collective. Raises `ConfigError` for a class, an argument or a value that cannot be used, and
    `TaskError` for a model without such parameters.
    """
    cls = _optimizer_class(config.name)
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise TaskError(
            f"{type(model).__name__} has no parameter that requires a gradient; expected at least one. "
            "Check what build_model freezes."
        )
    args = _arguments(cls, config)
    # On CPUs, too, torch's fused step is several times faster than its default, which loops over tensors.
    if "fused" in inspect.signature(cls).parameters and not args.keys() & {
        "fused",
        "foreach",
        "differentiable",
    }:
        args["fused"] = all(p.is_floating_point() for p in params) and not sparse_parameters(model)
    try:
        return cls(parameter_groups(model, config, cls), **args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optim: torch.optim.{config.name} cannot be made with lr = {config.lr}, args = {config.args}: "
            f"{error}. Expected values that the class accepts; see its documentation."
        ) from error


def _optimizer_class(name: str) -> type[Optimizer]:
    classes: dict[str, Any] = {
        n: v
        for n, v in vars(torch.optim).items()
        if inspect.isclass(v) and issubclass(v, Optimizer) and v is not Optimizer
    }
    if name in _UNUSABLE:
        raise ConfigError(
            f"optim.name = {name!r} cannot be used: {_UNUSABLE[name]}. Expected a class of torch.optim that "
            "steps without a closure, for example `SGD` or `AdamW`."
        )
    if name not in classes:
        usable = {n.lower(): n for n in classes if n not in _UNUSABLE}
        near = difflib.get_close_matches(name.lower(), usable, n=1)
        remedy = (
            f"Did you mean `{usable[near[0]]}`?"
            if near
            else f"There are {', '.join(sorted(usable.values()))}."
        )
        raise ConfigError(f"optim.name = {name!r}: expected a class of torch.optim. {remedy}")
    cls: type[Optimizer] = classes[name]
    return cls


def _arguments(cls: type[Optimizer], config: OptimConfig) -> dict[str, Any]:
    known = set(inspect.signature(cls).parameters) - {"params", "lr"}
    for name in config.args:
        if name == "lr":
            raise ConfigError(
                f"optim.args.lr = {config.args[name]!r}: expected the rate in optim.lr. Move it there."
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean `{near[0]}`?" if near else "Remove it."
            expected = f"an argument of torch.optim.{config.name}: {', '.join(sorted(known))}"
            raise ConfigError(f"optim.args.{name} is unknown; expected {expected}. {remedy}")
    args: dict[str, Any] = dict(config.args)
    if config.name == "SGD" and not args:
        args |= _SGD_DEFAULTS
    if "lr" in inspect.signature(cls).parameters:
        args["lr"] = config.lr
    return args


@final
class LocalStep:
    """One optimizer step on this rank's transformed batches: forward, backward, clip, step. Never
    communicates.

    Args:
        gradients: of the model whose parameters `optimizer` steps. They may be sparse, if the optimizer
            accepts them.
    """

    def __init__(self, gradients: Gradients, optimizer: Optimizer, config: OptimConfig) -> None:
        self._gradients = gradients
        self._optimizer = optimizer
        self._clip_norm = config.clip_norm
        self._params = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batches: Sequence[Batch]) -> StepDone:
        """One step with the gradient of the mean over all samples of `batches`; without a sample there is no
        step. Raises what `Gradients` raises."""
        if not batches:
            return StepDone(0.0, 0)
        loss_sum, num_samples = self._gradients(batches)
        if num_samples == 0:
            return StepDone(0.0, 0)
        if any(p.grad is not None and p.grad.is_sparse for p in self._params):
            self._step_sparse()
        else:
            if self._clip_norm:
                nn.utils.clip_grad_norm_(self._params, self._clip_norm)
            self._optimizer.step()
        return StepDone(loss_sum, num_samples)

    def _step_sparse(self) -> None:
        for group in self._optimizer.param_groups:
            if group.get("fused"):
                group["fused"] = False  # no fused step takes a sparse gradient
            for p in group["params"] if densifies(self._optimizer, group) else ():
                if p.grad is not None:
                    p.grad = p.grad.to_dense()
        if self._clip_norm:
            _clip_sparse([p for p in self._params if p.grad is not None], self._clip_norm)
        try:
            self._optimizer.step()
        except RuntimeError as error:
            raise TaskError(
                f"optim: {type(self._optimizer).__name__} cannot use the sparse gradients of this model: "
                f"{error}. Choose an optimizer that takes them (SGD without weight decay, Adagrad), or build "
                "the embeddings with sparse=False."
            ) from error


def _clip_sparse(params: Sequence[nn.Parameter], max_norm: float) -> None:
    """As `clip_grad_norm_`, which takes no sparse gradients. Repeated rows are added up first."""
    values = []
    for p in params:
        assert p.grad is not None  # the caller chose them
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
        values.append(p.grad.values() if p.grad.is_sparse else p.grad)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in values]))
    for v in values:
        v.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
