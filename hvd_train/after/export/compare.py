"""How far the outputs of an exported model are from those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference that is accepted, as a share of the largest output: other libraries add in another
order. Outputs of other types must be equal."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes_of(a), _bytes_of(b))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Output:
    """One tensor of the model's outputs, over all samples so far."""

    dtype: torch.dtype

    shape: tuple[int, ...]
    """Of the last batch, without the first axis."""

    largest: float = 0.0
    """The largest absolute output of the model."""

    difference: float = 0.0
    """The largest absolute difference; infinite where only one of the two is not a number."""

    def limit(self, exact: bool) -> float:
        """The largest difference that is accepted."""
        return 0.0 if exact else _RELATIVE.get(self.dtype, 0.0) * self.largest


@final
class Comparison:
    """Adds up what is compared.

    Args:
        exact: whether outputs must be equal, bit by bit.
    """

    def __init__(self, exact: bool) -> None:
        self._exact = exact
        self.outputs: list[Output] = []
        self.wrong = ""
        """What was wrong first in type or shape; empty if nothing was."""

    def add(self, expected: Sequence[Tensor], seen: Sequence[Tensor]) -> None:
        """The outputs of one batch, by the model and by what was exported."""
        if not self.outputs:
            self.outputs = [Output(dtype=t.dtype, shape=tuple(t.shape[1:])) for t in expected]
        kinds = [[f"{t.dtype} {list(t.shape)}" for t in outputs] for outputs in (expected, seen)]
        if kinds[0] != kinds[1] or len(expected) != len(self.outputs):
            self.wrong = self.wrong or f"its outputs are {kinds[1]}; the model's are {kinds[0]}"
            return
        for output, a, b in zip(self.outputs, expected, seen, strict=True):
            output.shape = tuple(a.shape[1:])
            output.largest = max(output.largest, _largest(a))
            output.difference = max(output.difference, _difference(a, b))

    @property
    def difference(self) -> float:
        """The largest absolute difference of all outputs."""
        return max((output.difference for output in self.outputs), default=0.0)

    @property
    def largest(self) -> float:
        """The largest absolute output of the model."""
        return max((output.largest for output in self.outputs), default=0.0)

    def limit(self, output: Output) -> float:
        """The largest difference that is accepted for this output."""
        return output.limit(self._exact)

    def failure(self) -> str:
        """Why what was exported is not the model; empty if it is."""
        if self.wrong:
            return self.wrong
        for i, output in enumerate(self.outputs):
            if not output.difference <= self.limit(output):
                return (
                    f"output {i} differs by up to {output.difference:.3g}; expected at most "
                    f"{self.limit(output):.3g}, for outputs up to {output.largest:.3g}"
                )
        return ""


def _largest(outputs: Tensor) -> float:
    finite = _wide(outputs)[torch.isfinite(outputs)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = _wide(a), _wide(b)
    far = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return float(far.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if far.numel() else 0.0


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.complex128 if outputs.is_complex() else torch.float64)
