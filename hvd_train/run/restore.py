"""The state of a run from a checkpoint: what does not fit is refused before anything of it is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvd_train.errors import RunDirectoryError, TaskError, UserError
from hvd_train.io.stateful import State, Stateful
from hvd_train.run.model_state import as_held, load_state
from hvd_train.run.saved_checkpoint import MODEL_FILE, SavedCheckpoint


def saved_states(
    saved: SavedCheckpoint, rank: int, parts: Collection[str], optional: Collection[str] = ()
) -> dict[str, State]:
    """What this rank saved of every part; of those that are optional, where it is there. Not collective.

    Raises `RunDirectoryError` for a part that is missing or unknown.
    """
    states: dict[str, State] = {**saved.parts(rank)}
    if not set(parts) - set(optional) <= states.keys() <= set(parts):
        raise saved.refusal(
            f"rank-*.safetensors: the state of {', '.join(sorted(states))}; expected that of "
            f"{', '.join(sorted(parts))}"
        )
    return states


def restore(
    saved: SavedCheckpoint, model: nn.Module, parts: Mapping[str, Stateful], states: Mapping[str, State]
) -> None:
    """Gives `model` its saved state, and the parts theirs of `states`. Not collective.

    Raises `RunDirectoryError` for a state that does not fit.
    """
    restore_model(saved, model)
    for name, state in states.items():
        try:
            parts[name].load_state_dict(state)
        except (RunDirectoryError, TaskError) as error:
            raise saved.refusal(
                f"rank-*.safetensors: the state of {name}: {str(error).rstrip('.')}"
            ) from error


def restore_model(saved: SavedCheckpoint, model: nn.Module, name: str = MODEL_FILE) -> None:
    """Gives `model` its saved state, of the file `name`. Raises `RunDirectoryError` for one of another
    model."""
    state = as_held(model, saved.model(name))
    wrong = _difference(model.state_dict(keep_vars=True), state)  # lazy ones cannot be detached
    if wrong:
        raise RunDirectoryError(
            f"{saved.folder}/{name}: {wrong}. Resume with the model that the run began with."
        )
    try:
        with torch.no_grad():
            load_state(model, state)
    except UserError:
        raise
    except Exception as error:  # of torch, or of the model's own code
        raise saved.refusal(f"{name}: the model does not accept it: {error}") from error


def _difference(model: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The first thing in which a saved state is not that of the model, in words; empty if there is none."""
    lacking, unknown = sorted(model.keys() - saved.keys()), sorted(saved.keys() - model.keys())
    if lacking:
        return f"it lacks `{lacking[0]}`"
    if unknown:
        return f"it has `{unknown[0]}`, which the model does not have"
    for name, value in model.items():
        here, there = _kind(value), _kind(saved[name])
        if here != there and not (isinstance(value, Tensor) and is_lazy(value)):
            return f"`{name}` is {there}; the model has {here}"
    return ""


def _kind(value: Any) -> str:
    """Type and shape, in words."""
    if not isinstance(value, Tensor):
        return "not a tensor"
    return "not initialised" if is_lazy(value) else f"{value.dtype} {list(value.shape)}"
