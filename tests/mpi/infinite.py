"""What gives a parameter a gradient that is not finite, while the loss is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Infinite(torch.autograd.Function):
    """0, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(ctx.saved_tensors[0], math.inf)
