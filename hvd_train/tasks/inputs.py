"""How the built-in models take their inputs: scaled, or standardized."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hvd_train.data.format import SampleSpec
from hvd_train.data.grouping import channels_last, shape_of_moments, usual_grouping
from hvd_train.errors import TaskError

_WIDE = ("float64", "int32", "int64", "uint32", "uint64")
"""Types of which numbers far from 0 lose digits in float32; their mean is subtracted in float64."""


@final
class Inputs(nn.Module):
    """Samples [B, *shape] -> the same in the type of the parameters behind it. Integers are multiplied by the
    scale of the sample. Where the sample is to be standardized, numbers of any type minus `mean`, divided by
    `deviation`: buffers that broadcast with a sample, float64 for inputs with more digits than float32 has.
    They are constant: no average changes them.

    Raises `TaskError` for samples that do not have the channels that `standardize` names.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: SampleSpec) -> None:
        super().__init__()
        self.scale = spec.scale
        self.standardizes = spec.standardize != ""
        if spec.standardize == "":
            return
        field = spec.fields[spec.inputs]
        if spec.standardize == "channel" and (len(field.shape) < 2 or channels_last(field.shape)):
            looks = ", which looks like channels last" if len(field.shape) > 2 else ""
            raise TaskError(
                f"data.standardize = 'channel': `{spec.inputs}` has the shape {list(field.shape)} a "
                f"sample{looks}; expected [channels, ...], of two axes or more. Take "
                f"{usual_grouping(field.shape)!r}."
            )
        shape = shape_of_moments(field.shape, spec.standardize)
        dtype = torch.float64 if field.dtype in _WIDE else torch.get_default_dtype()
        self.register_buffer("mean", torch.zeros(shape, dtype=dtype))
        self.register_buffer("deviation", torch.ones(shape, dtype=dtype))

    def forward(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        if self.standardizes:
            return ((inputs.to(self.mean.dtype) - self.mean) / self.deviation).to(dtype)
        prepared = inputs.to(dtype)
        return prepared if inputs.is_floating_point() or self.scale == 1 else prepared * self.scale

    @torch.no_grad()
    def take(self, mean: npt.NDArray[np.float64], deviation: npt.NDArray[np.float64]) -> None:
        """Sets the buffers. A deviation that their type rounds to 0 is 1."""
        self.mean.copy_(torch.from_numpy(mean).view_as(self.mean))
        self.deviation.copy_(torch.from_numpy(deviation).view_as(self.deviation))
        self.deviation.masked_fill_(self.deviation == 0, 1)


def constant_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that no average may change."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, Inputs)
        for buffer, _ in module.named_buffers()
    }
