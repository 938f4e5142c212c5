"""The floating-point buffers that are not averaged in every round, as each rank saves its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.optimizer_state import as_real
from hvd_train.errors import RunDirectoryError
from hvd_train.run.model_state import plain_names


class OwnBuffers:
    """Stateful: the buffers with a period of their own, and those that are kept. The model's own file has
    those of rank 0."""

    def __init__(self, model: nn.Module, flat: FlatState) -> None:
        self._model = model
        self._flat = flat

    def _held(self) -> dict[str, Tensor]:
        own = self._flat.own_buffers()
        names = plain_names(self._model, own)
        return {names[name]: as_real(buffer) for name, buffer in own.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors by the names of the buffers, without those of wrappers."""
        return dict(self._held())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies them into the model; what is averaged in every round now is left out. Raises
        `RunDirectoryError` for a buffer of another type or shape."""
        for name, buffer in self._held().items():
            value = state.get(name, buffer)
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (buffer.shape, buffer.dtype):
                raise RunDirectoryError(
                    f"`{name}` is not a buffer of this model: expected {buffer.dtype} {list(buffer.shape)}"
                )
            buffer.copy_(value)
