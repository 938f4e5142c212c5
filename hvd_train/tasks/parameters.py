"""Chooses parameters of a model by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hvd_train.errors import ConfigError
from hvd_train.run.model_state import plain_names

_NAMED = 4
"""Names that a message lists."""


def by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names without those of wrappers; a shared one by each of its names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    names = plain_names(model, found)
    return {names[name]: p for name, p in found.items()}


def fitting(pattern: str, key: str, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """The parameters whose names fit a pattern with `*`, `?` and `[...]`; upper and lower case differ.

    Raises `ConfigError`, naming `key` and names that are near, if there is none.
    """
    found = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, parameters, n=_NAMED, cutoff=0.5)
        names = near or list(parameters)[:_NAMED]
        raise ConfigError(
            f"{key} = {pattern!r}: no parameter has a name that fits; expected a pattern such as `layers.*`. "
            f"There are {len(parameters)}, {'near it' if near else 'among them'} {', '.join(names)}."
        )
    return found


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes the parameters that fit any of `patterns` out of the training; their values stay as they are. The
    statistics of a batch norm are not parameters and go on.

    Raises `ConfigError` for a pattern that fits none, and where no parameter would be left.
    """
    parameters = by_name(model)
    for pattern in patterns:
        for p in fitting(pattern, "model.freeze", parameters):
            p.requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(
            f"model.freeze = {tuple(patterns)!r}: no parameter is left to train; expected at least one of "
            f"{len(parameters)}. Remove a pattern."
        )
