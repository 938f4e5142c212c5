"""A model as the bytes of a file, with what is needed to check them; the format safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_train.after.export.calls import Call, call_of, model_scaling, names_of, tensors_of, transforms
from hvd_train.after.export.compare import same_bits
from hvd_train.after.export.samples import Samples
from hvd_train.after.trained import Trained
from hvd_train.errors import ExportDiffers
from hvd_train.run.model_state import load_state, saved_state, unwrapped
from hvd_train.run.packing import pack, unpack
from hvd_train.tasks.base import Batch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional ones and those by name."""

Runner = Callable[..., list[Tensor]]
"""Calls what was loaded; takes what the exported model takes and gives the tensors of its outputs."""

FEW, MORE = 3, 5
"""Rows of two batches: what differs between them depends on the number of rows."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of an exported model."""

    name: str

    dtype: str

    shape: tuple[int | str, ...]
    """`batch` for the number of rows."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """What is to be written, and how it is checked."""

    content: bytes

    inputs: tuple[Input, ...]

    included: tuple[str, ...]
    """Preprocessing that is a part of it."""

    left_out: tuple[str, ...]
    """Preprocessing that is not."""

    exact: bool
    """Whether its outputs must be those of the model, bit by bit."""

    arguments: Callable[[Batch, Call], Arguments]
    """What it is called with for a batch as it was read, whose call of the model is given."""

    load: Callable[[bytes], Runner]
    """Reads such bytes, by the library that users have. Raises `ExportDiffers` where values in them are not
    those of the model, and errors of the library."""


def require_same(seen: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises `ExportDiffers` unless two states have the same names, and tensors of the same bits."""
    if seen.keys() != expected.keys():
        raise ExportDiffers(f"{what}: {sorted(seen)}; the model has {sorted(expected)}")
    for name, value in expected.items():
        if isinstance(value, Tensor) and not same_bits(seen[name], value):
            raise ExportDiffers(f"{what}: `{name}` differs from the model's")


def input_of(name: str, few: Tensor, more: Tensor) -> Input:
    """The description of an input, by its values for `FEW` and for `MORE` rows."""
    pairs = zip(few.shape, more.shape, strict=True)
    shape = tuple("batch" if (a, b) == (FEW, MORE) else a if a == b else "any" for a, b in pairs)
    return Input(name=name, dtype=str(few.dtype).removeprefix("torch."), shape=shape)


def safetensors(trained: Trained, model: nn.Module, samples: Samples, about: Mapping[str, str]) -> Product:
    """The state of `model` by the names that a checkpoint has. It is checked in a model that the task builds
    anew."""
    task = trained.task
    few, more = (call_of(task, model, samples.repeated(size)) for size in (FEW, MORE))
    left_out = (
        *(f"{line} (by the model's code)" for line in model_scaling(trained, model)),
        *(
            [f"the transform of {type(task).__name__} (apply it before the model)"]
            if transforms(task)
            else ()
        ),
    )
    tensors, plain = saved_state(model)

    def load(content: bytes) -> Runner:
        seen, extra = unpack(content)
        require_same(seen, tensors, "its tensors")
        if extra != plain:
            raise ExportDiffers("its values that are not tensors differ from the model's")
        fresh = unwrapped(task.build_model(trained.saved.sample))
        with torch.no_grad():
            load_state(fresh, {**seen, **extra})
        fresh.eval()
        return lambda *args, **kwargs: tensors_of(fresh(*args, **kwargs))

    pairs = zip(names_of(model, few), zip(few.tensors, more.tensors, strict=True), strict=False)
    return Product(
        content=pack(tensors, plain, {"format": "pt", **about, "left_out": "; ".join(left_out)}),
        inputs=tuple(input_of(name, *values) for name, values in pairs),
        included=(),
        left_out=left_out,
        exact=True,
        arguments=lambda _, call: (call.args, call.kwargs),
        load=load,
    )
