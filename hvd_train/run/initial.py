"""The weights that a new run starts from: a file in the safetensors format, or a checkpoint of a run.

The tensors are mapped from the file and copied one by one into the model, so that reading takes no memory in
which the file would be there a second time. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hvd_train.config import ModelConfig
from hvd_train.config_values import shown
from hvd_train.errors import ConfigError, RunDirectoryError, TaskError, UserError
from hvd_train.io.text import listed
from hvd_train.run.model_state import finder, load_state
from hvd_train.run.saved_checkpoint import MODEL_FILE, find_checkpoint


def start_from(model: nn.Module, config: ModelConfig) -> str:
    """Gives `model` the weights of `config.init`; returns in words what was taken. Not collective.

    Raises `ConfigError` for a file that cannot be read or does not fit, and `RunDirectoryError` for a run or
    checkpoint that cannot be read. The model is unchanged then.
    """
    file = _file(config.init)
    saved = _read(file, config.init)
    held = model.state_dict(keep_vars=True)
    chosen = _chosen(model, held, _renamed(saved, config.init_map))
    _require_fit(file, {key: (held[key], saved[name]) for key, name in chosen.items()})
    missing, unused = _missing(held, chosen), sorted(saved.keys() - set(chosen.values()))
    apart = _apart(missing, unused)
    found = f"{len(held) - len(missing)} of {len(held)} tensors"
    if not chosen or (config.init_strict and apart):
        remedy = " or set model.init_strict = false to leave the rest as it is built." if chosen else ""
        raise ConfigError(
            f"model.init = {shown(config.init)}: {found} of the model are in {file}{apart}. Expected the "
            f"names of the model. Rename by model.init_map{',' if remedy else '.'}{remedy}"
        )
    _load(model, {key: saved[name] for key, name in chosen.items()}, config.init)
    return f"{file if Path(config.init) == file else file.parent}: {found}{apart}"


def _chosen(model: nn.Module, held: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """For each name of the model's state that is in the file, the name there.

    Args:
        names: for each name in the file the one that it has after renaming.
    """
    find = finder(model, held)
    chosen: dict[str, str] = {}
    for name, target in names.items():
        key = find(target)
        if key is not None and chosen.setdefault(key, name) != name:
            raise ConfigError(
                f"model.init_map: `{chosen[key]}` and `{name}` of the file both become `{key}`; expected one "
                "tensor for each name of the model. Change the prefixes."
            )
    return chosen


def _file(init: str) -> Path:
    """The file that `model.init` names; where that is a run or checkpoint, its model, of the right
    checksum."""
    path = Path(init)
    try:
        if path.is_dir():
            saved = find_checkpoint(path, "best") or find_checkpoint(path, "latest")
            if saved is not None:
                return saved.file(MODEL_FILE)
            raise RunDirectoryError(f"{path}: the run has no checkpoint; expected one to start from.")
        if path.is_file():
            return path
    except RunDirectoryError as error:
        raise RunDirectoryError(f"model.init: {error}") from None
    except (OSError, ValueError):  # a name too long, a folder that is closed to this user
        pass
    raise ConfigError(
        f"model.init = {shown(init)}: there is no such file; expected a safetensors file, a run's folder, or "
        "RUN/checkpoints/round-N."
    )


def _read(file: Path, init: str) -> dict[str, Any]:
    """The tensors by name, mapped from the file, and what else a checkpoint holds of a model's state."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            state = (opened.metadata() or {}).get("state", "")
    except Exception as error:  # of the library: errors of its own, OSError, KeyError for a type
        raise ConfigError(
            f"model.init = {shown(init)}: {file} cannot be read: {error}. Expected a whole file in the "
            "safetensors format, as safetensors.torch.save_file writes it; pickles of torch.save are not "
            "loaded."
        ) from None
    try:
        plain = json.loads(state) if state else {}
    except ValueError:  # another program's
        plain = {}
    return {**(plain if isinstance(plain, dict) else {}), **tensors}


def _renamed(names: Collection[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """For each name in the file the name in the model."""
    longest_first = sorted(prefixes, key=len, reverse=True)
    renamed, used = {}, set()
    for name in sorted(names):
        prefix = next((p for p in longest_first if name.startswith(p)), None)
        used.add(prefix)
        renamed[name] = name if prefix is None else prefixes[prefix] + name[len(prefix) :]
    for prefix in prefixes:
        if prefix not in used:
            raise ConfigError(
                f"model.init_map: {prefix!r} renames no tensor of the file; expected the beginning of a "
                f"name. The file has {listed(sorted(names)) or 'none'}."
            )
    return renamed


def _require_fit(file: Path, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises `ConfigError` for a tensor of another shape, or of a kind that is not the model's.

    Args:
        pairs: by name what the model has, and what the file has.
    """
    for key, (own, found) in pairs.items():
        here, there = _kind(own, found), _kind(found, own)
        if here != there:
            raise ConfigError(
                f"model.init: `{key}` is {there} in {file}, but {here} in the model; expected the same. "
                "Build the model of the file, or leave the tensor out: model.init_strict = false, and in "
                "model.init_map a new name for it that the model does not have."
            )


def _kind(value: Any, other: Any) -> str:
    """Kind and shape in words. Numbers with a fraction may be of any width, and complex ones are in a file as
    pairs."""
    if not isinstance(value, Tensor):
        return "no tensor"
    if value.is_complex() and isinstance(other, Tensor) and not other.is_complex():
        value = torch.view_as_real(value.detach())
    kind = "floating-point" if value.is_floating_point() else str(value.dtype)
    return f"{kind} {list(value.shape)}"


def _missing(held: Mapping[str, Any], chosen: Collection[str]) -> list[str]:
    """The names of the model that are not in the file; a tensor that has another name, which is there, is
    not missing."""
    there = {id(held[key]) for key in chosen}
    return [key for key, value in held.items() if key not in chosen and id(value) not in there]


def _apart(missing: Sequence[str], unused: Sequence[str]) -> str:
    """The names that are not in both, in words; empty if there are none."""
    lacks = f"; not in the file, as built: {listed(missing)}" if missing else ""
    return lacks + (f"; in the file, not used: {listed(unused)}" if unused else "")


def _load(model: nn.Module, state: Mapping[str, Any], init: str) -> None:
    try:
        with torch.no_grad():
            load_state(model, {**model.state_dict(), **state})
    except UserError:
        raise
    except Exception as error:  # of torch, or of the model's own code
        raise TaskError(
            f"model.init = {shown(init)}: the model does not accept the weights: {error}. Expected those of "
            "the same model."
        ) from error
