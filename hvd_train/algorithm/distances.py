"""Squared distances and norms of flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Elements per block of a squared distance; a block stays in cache between the two passes."""


def squared_distance(a: Tensor, b: Tensor) -> float:
    """||a - b||^2 of two flat tensors, in blocks; float32 (float64 for float64) within a block, float64
    between blocks. Not finite if either holds a value that is not."""
    wide = a.dtype if a.dtype.itemsize >= 4 else torch.float32
    total = 0.0
    for start in range(0, a.numel(), _BLOCK):
        difference = a[start : start + _BLOCK].to(wide) - b[start : start + _BLOCK]
        total += float(difference.dot(difference))
    return total


def squared_norm(a: Tensor) -> float:
    """||a||^2 of a flat tensor, in blocks, as `squared_distance`."""
    wide = a.dtype if a.dtype.itemsize >= 4 else torch.float32
    blocks = (a[start : start + _BLOCK].to(wide) for start in range(0, a.numel(), _BLOCK))
    return sum(float(block.dot(block)) for block in blocks)
