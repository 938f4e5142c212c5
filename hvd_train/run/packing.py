"""A file of a checkpoint: tensors in the safetensors format, and what JSON can hold. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hvd_train.errors import TaskError


def pack(tensors: Mapping[str, Tensor], plain: Any, about: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file. The tensors are copied: the live ones may be views of one flat buffer, and the
    format demands that no two share memory. Both must have passed `require_savable`.

    Args:
        about: further metadata, for those who read the file; `unpack` does not return it.
    """
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return save(copies, metadata={**(about or {}), "state": json.dumps(plain)})


def unpack(content: bytes) -> tuple[dict[str, Tensor], Any]:
    """What was packed. Raises `ValueError` for bytes that `pack` does not write."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return load(content), json.loads(header.get("__metadata__", {}).get("state", "{}"))
    except Exception as error:  # of the library: an error of its own, KeyError for a type, and others
        raise ValueError(f"not in the safetensors format: {error}") from None


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state, and the rest."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def require_savable(state: Mapping[str, Any], where: str) -> None:
    """Raises `TaskError`, naming the entry, for a value that would not come back from a file as it is. Copies
    no tensor.

    Args:
        where: what the state is of, for the message.
    """
    for key, value in state.items():
        reason = _refusal(key, value)
        if reason:
            name = key.encode(errors="backslashreplace").decode()
            raise TaskError(
                f"`{name}` in the state of {where} cannot be saved in a checkpoint: {reason}. Expected a "
                "number, text, a list, a dictionary with text as keys, or a dense tensor of a type that "
                "safetensors supports. For a buffer that can be computed again: "
                "register_buffer(..., persistent=False)."
            )


def _refusal(key: str, value: Any) -> str:
    """Why a value cannot be saved; empty if it can."""
    if not isinstance(value, Tensor):
        try:
            same = repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError, RecursionError) as error:
            return f"it is a {type(value).__name__}: {error}"
        return "" if same else f"{value!r} is changed by a round trip through JSON"
    if value.layout is not torch.strided:
        return f"it is a tensor with the layout {value.layout}"
    unusual = key == "__metadata__" or not key.isascii()
    if unusual and (reason := _refused_by_library(key, torch.uint8)):
        return f"its name: {reason}"
    return _refused_by_library("x", value.dtype)


@cache
def _refused_by_library(key: str, dtype: torch.dtype) -> str:
    """Why safetensors does not take such a tensor; empty if it does."""
    try:
        load(save({key: torch.empty(0, dtype=dtype)}))
    except Exception as error:  # KeyError for a type, SafetensorError or UnicodeEncodeError for a name
        return f"{dtype}, {type(error).__name__}: {error}"
    return ""
