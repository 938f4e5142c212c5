"""What survives a restart: whatever gives its state as tensors and JSON scalars, and takes it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

State = Mapping[str, Any]
"""Keys are strings; a value is a tensor, or something that JSON can hold."""


@runtime_checkable
class Stateful(Protocol):
    """A part of a run that a checkpoint saves. Neither method is collective."""

    def state_dict(self) -> dict[str, Any]:
        """The state; tensors in it may be the live ones, they are written before training goes on."""
        ...

    def load_state_dict(self, state: State) -> object:
        """Takes back what `state_dict` gave."""
        ...
