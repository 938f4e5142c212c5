"""What survives a restart: objects that return their state as tensors and JSON values, and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import msgspec

from hvd_train.errors import RunDirectoryError

State = Mapping[str, Any]
"""Keys are strings; a value is a tensor, or something that JSON can hold."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A number of things in a saved state."""

S = TypeVar("S", bound=msgspec.Struct)


@runtime_checkable
class Stateful(Protocol):
    """A part of a run that a checkpoint saves. Neither method is collective."""

    def state_dict(self) -> dict[str, Any]:
        """The state; tensors in it may be the live ones, they are written before training goes on."""
        ...

    def load_state_dict(self, state: State) -> object:
        """Restores what `state_dict` returned. Raises `RunDirectoryError` for anything else, and then changes
        nothing."""
        ...


def checked(state: State, schema: type[S]) -> S:
    """A saved state as its schema. Raises `RunDirectoryError` for a key that is missing or unknown, or a
    value of another type."""
    try:
        return msgspec.convert(dict(state), schema)
    except msgspec.ValidationError as error:
        raise RunDirectoryError(str(error).replace("`$.", "`")) from None
