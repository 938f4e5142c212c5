"""Which tensors of a model are averaged: its trainable parameters and its floating-point buffers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hvd_train.comm.buffer import DTYPES
from hvd_train.errors import TaskError
from hvd_train.run.model_state import unusual
from hvd_train.tasks.inputs import constant_buffers


def model_tensors(model: nn.Module, with_buffers: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Name, kind (`parameter` or `buffer`) and tensor of each, in the order of the model. Raises `TaskError`
    for one that cannot be averaged, named."""
    for name, p in model.named_parameters():
        _require_ready("parameter", name, p)
        if p.requires_grad:
            if not is_averaged(p):
                seen = unusual(p) or f"of dtype {p.dtype}"
                raise TaskError(
                    f"parameter `{name}` is {seen}; expected a dense tensor of one of "
                    f"{', '.join(map(str, DTYPES))}, or of a complex type of these."
                )
            yield name, "parameter", p
    constant = constant_buffers(model)
    for name, b in model.named_buffers():
        _require_ready("buffer", name, b)
        if with_buffers and is_averaged(b) and name not in constant:
            yield name, "buffer", b


def _require_ready(kind: str, name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise TaskError(
            f"{kind} `{name}` has no shape yet: its module is lazy. Call the model on one batch first."
        )
    if tensor.device.type != "cpu":
        raise TaskError(f"{kind} `{name}` is on {tensor.device}; expected cpu: only CPUs are averaged today.")


def is_averaged(tensor: Tensor) -> bool:
    """Whether a parameter or buffer is of a kind that can be in the flat state."""
    return not unusual(tensor) and (tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype) in DTYPES
