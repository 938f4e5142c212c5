"""The optimizer's parameter groups: parts of a model with a learning rate and a weight decay of their own."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hvd_train.config import OptimConfig
from hvd_train.errors import ConfigError
from hvd_train.tasks.parameters import by_name, fitting

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_REST = -1
"""The parameters that no pattern fits."""


def parameter_groups(model: nn.Module, config: OptimConfig, cls: type[Optimizer]) -> list[dict[str, Any]]:
    """The trained parameters of `model` as groups of an optimizer of class `cls`, in the order of the model
    within each: first those that no pattern fits, then those of `config.groups` in their order. With
    `decay = "matrices"` each of these is in two parts, with and without weight decay. None is empty.

    Raises `ConfigError` for a pattern that no parameter is left for, and for weight decay that the class does
    not have.
    """
    group_of = _group_of(model, config)
    bare = _without_decay(model) if config.decay == "matrices" else set()
    _require_decay(config, cls)
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            members.setdefault((group_of.get(p, _REST), p in bare), []).append(p)
    return [{"params": members[key], **_settings(config, *key)} for key in sorted(members)]


def _group_of(model: nn.Module, config: OptimConfig) -> dict[nn.Parameter, int]:
    parameters = by_name(model)
    found: dict[nn.Parameter, int] = {}
    for i, group in enumerate(config.groups):
        fits = fitting(group.pattern, "optim.groups.pattern", parameters)
        left = [p for p in fits if p.requires_grad and p not in found]
        if not left:
            raise ConfigError(
                f"optim.groups.pattern = {group.pattern!r}: every parameter that it fits is frozen or in a "
                "group before it; expected at least one that is left. Remove the group, or put it first."
            )
        found |= dict.fromkeys(left, i)
    return found


def _without_decay(model: nn.Module) -> set[nn.Parameter]:
    """Biases and the like, and all parameters of norms."""
    norms = {p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    return norms | {p for p in model.parameters() if p.dim() < 2}


def _require_decay(config: OptimConfig, cls: type[Optimizer]) -> None:
    asked = config.decay != "all" or any(group.weight_decay is not None for group in config.groups)
    if asked and "weight_decay" not in inspect.signature(cls).parameters:
        key = "optim.groups.weight_decay" if config.decay == "all" else f"optim.decay = {config.decay!r}"
        raise ConfigError(
            f"{key}: torch.optim.{config.name} has no weight decay. Expected a class that has it, such as "
            "AdamW, or no such setting."
        )


def _settings(config: OptimConfig, group: int, without_decay: bool) -> dict[str, float]:
    """What differs from the optimizer's own arguments."""
    settings = {}
    if group != _REST:
        of = config.groups[group]
        settings["lr"] = config.lr * of.lr_factor
        if of.weight_decay is not None:
            settings["weight_decay"] = of.weight_decay
    return {**settings, "weight_decay": 0.0} if without_decay else settings
