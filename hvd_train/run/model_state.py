"""A model's state as a file holds it: named as the task wrote the model, in types that the file can hold.

`torch.compile` and `DataParallel` wrap a module and put a name of their own into the names of its state.
Files do not contain it: the state of a compiled model loads into the plain one, and vice versa.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hvd_train.errors import TaskError

_COMPILED = "_orig_mod"
"""What `torch.compile` calls the module that it wraps."""


def saved_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values (of `get_extra_state`) by name; the tensors share memory with the model's. A
    complex type that the file format lacks is given as real, with a last dimension of 2.

    Raises `TaskError`, naming it, for what cannot be saved.
    """
    state = model.state_dict()
    names = plain_names(model, state)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[names[key]] = _storable(key, value.detach())
        elif _is_plain(value):
            plain[names[key]] = value
        else:
            raise TaskError(
                f"the model's state `{key}` is {type(value).__name__} {str(value)[:60]!r}, which cannot be "
                "saved; expected a tensor, or what JSON can hold (numbers, text, lists, dictionaries with "
                "text as keys). Have get_extra_state return such values, or leave them out of the state."
            )
    return tensors, plain


def as_held(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `saved_state` gave, of this model or of its compiled or plain form, by the names and in the types
    of this model; also with the names that a wrapper put in."""
    held = model.state_dict(keep_vars=True)  # lazy ones cannot be detached
    find = finder(model, held)
    state = {}
    for name, value in saved.items():
        key = find(name) or name
        state[key] = _as_complex(value) if _was_split(held.get(key), value) else value
    return state


def load_state(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Takes back what `saved_state` gave, see `as_held`. Raises `RuntimeError` for names or shapes that do
    not fit."""
    for buffer in model.buffers():
        if not unusual(buffer) and 0 in buffer.stride():  # expanded: torch cannot copy into it
            buffer.data = buffer.contiguous()
    model.load_state_dict(as_held(model, saved))


@contextlib.contextmanager
def buffers_as_they_are(model: nn.Module) -> Iterator[None]:
    """Restores the values of the model's buffers after the body, in place."""
    put_back = [_present_values(buffer) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for call in put_back:
                call()


def _present_values(buffer: Tensor) -> Callable[[], object]:
    """A function that restores the present values of a buffer, in place."""
    if buffer.layout is torch.strided:
        # Its memory: an expanded tensor, whose elements share it, cannot be written to.
        buffer = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
    value = buffer.clone()
    return lambda: buffer.copy_(value)


def finder(model: nn.Module, keys: Collection[str]) -> Callable[[str], str | None]:
    """Gives for a name in a file, with or without those of wrappers, the one of `keys` that is meant."""
    by_plain = {plain: key for key, plain in plain_names(model, keys).items()}
    return lambda name: name if name in keys else by_plain.get(_without_compiled(name))


def plain_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """For each of `keys`, names in the model's state, that without the names of wrappers; all as they are if
    two would become one."""
    names = {key: _plain_name(model, key) for key in keys}
    return names if len(set(names.values())) == len(names) else {key: key for key in names}


def _plain_name(model: nn.Module, key: str) -> str:
    module: nn.Module | None = model
    kept = []
    for part in key.split("."):
        if module is None or part != _wrapped(module):
            kept.append(part)
        module = getattr(module, part) if module is not None and part in module._modules else None
    return ".".join(kept)


def _wrapped(module: nn.Module) -> str | None:
    """The name of the module that `module` wraps; None if it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return _COMPILED if _COMPILED in module._modules else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model: without what `torch.compile` and `DataParallel` put around `model` and around modules
    in it. Changes `model` in place."""
    while (name := _wrapped(model)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    if getattr(model, "_compiled_call_impl", None) is not None:
        model._compiled_call_impl = None  # of Module.compile
    for name, child in model.named_children():
        model._modules[name] = unwrapped(child)
    return model


def _without_compiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _storable(name: str, tensor: Tensor) -> Tensor:
    kind = unusual(tensor)
    if not kind and _has_place(tensor.dtype):
        return tensor
    if not kind and tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    raise TaskError(
        f"the model's state `{name}` is {kind or tensor.dtype}, which a checkpoint cannot hold; expected a "
        "dense tensor of a plain type on the CPU. Keep it in another form, or register it as a buffer with "
        "persistent=False."
    )


def unusual(tensor: Tensor) -> str:
    """What keeps a tensor from being read as plain memory of the CPU, in words; empty if nothing does."""
    if nn.parameter.is_lazy(tensor):
        return "not initialised"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"of layout {tensor.layout}"
    return "" if tensor.device.type == "cpu" else f"on {tensor.device}"


@functools.cache
def _has_place(dtype: torch.dtype) -> bool:
    """Whether the file format has a type: newer versions have more."""
    try:
        return load(save({"x": torch.zeros(1, dtype=dtype)}))["x"].dtype is dtype
    except Exception:  # each version has errors of its own
        return False


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) for k in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _was_split(held: object, value: object) -> bool:
    if not (isinstance(held, Tensor) and isinstance(value, Tensor)) or not held.is_complex():
        return False
    return not value.is_complex() and value.shape == (*held.shape, 2)


def _as_complex(value: Tensor) -> Tensor:
    return torch.view_as_complex(value.contiguous())
