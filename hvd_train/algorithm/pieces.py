"""The pieces of the parameters that a rank owns: how values of theirs are saved and dealt anew.

A slice of a buffer begins and ends anywhere: within a parameter, too. What a rank keeps of its slice is saved
by parameter with the offset of the piece, so that any other number of ranks can take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_train.algorithm.flat_state import Entry, FlatState, Part
from hvd_train.comm.base import Communicator
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import State


class Piece(NamedTuple):
    """What a rank owns of one parameter."""

    entry: Entry
    first: int
    """Where in the buffer it begins."""
    last: int
    """The element after its last one."""

    @property
    def offset(self) -> int:
        """Where in the parameter's memory it begins."""
        return self.first - self.entry.start


class Pieces:
    """The pieces of this rank. The parameters must have buffers of their own; the memory of several names is
    one piece."""

    def __init__(self, flat: FlatState, comm: Communicator) -> None:
        self.parts = [part for part in flat.parts if part.parameters]
        """The buffers that have them."""
        self.owned = {part: comm.owned(flat.numel(part)) for part in self.parts}
        """[start, stop) of the slice that this rank owns of each."""
        self.entries = {part: list(_distinct(flat, part)) for part in self.parts}
        """The parameters in each; the same on every rank."""
        self._of = {part: list(self._cut(part)) for part in self.parts}

    def _cut(self, part: Part) -> Iterable[Piece]:
        start, stop = self.owned[part]
        for entry in self.entries[part]:
            first, last = max(start, entry.start), min(stop, entry.stop)
            if first < last:
                yield Piece(entry, first, last)

    def of(self, part: Part) -> Sequence[Piece]:
        """Those in a buffer."""
        return self._of[part]

    def inside(self, piece: Piece, owned: Tensor) -> Tensor:
        """The elements of a piece in a tensor whose last dimension is this rank's slice; a view."""
        start, _ = self.owned[piece.entry.part]
        return owned[..., piece.first - start : piece.last - start]

    def saved(self, held: Callable[[Piece], Mapping[str, Tensor]]) -> dict[str, Any]:
        """`offsets` of the pieces of which something is held, by parameter, and `key/parameter`: its tensors.

        Args:
            held: of a piece, by key: flat tensors of its length, or single numbers, which are the same for
                all pieces of a parameter.
        """
        offsets: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        for piece in (piece for part in self.parts for piece in self._of[part]):
            for key, values in held(piece).items():
                offsets[piece.entry.name] = piece.offset
                tensors[f"{key}/{piece.entry.name}"] = values
        return {"offsets": offsets, **tensors}

    @torch.no_grad()
    def take(
        self,
        states: Iterable[tuple[Mapping[str, int], State]],
        held: Callable[[Piece], Mapping[str, Tensor]],
        keeper: str,
    ) -> None:
        """Copies what ranks have saved to the pieces of this rank, whatever the number of ranks was; reads no
        further state once it has all. A piece that none has stays as it is. Not collective.

        Args:
            states: of each rank `offsets` and the rest, as `saved` gives them.
            held: where the values of a piece go.
            keeper: what keeps them, in words.

        Raises `RunDirectoryError` for a tensor that is missing, or of another type.
        """
        wanted = [(piece, held(piece)) for part in self.parts for piece in self._of[part]]
        missing = sum(piece.last - piece.first for piece, values in wanted if values)
        for offsets, state in states:
            for piece, values in wanted:
                if piece.entry.name in offsets:
                    missing -= _copy(state, offsets[piece.entry.name], piece, values, keeper)
            if missing <= 0:
                return


def _distinct(flat: FlatState, part: Part) -> Iterable[Entry]:
    """The parameters in a buffer that have elements, of those in the same memory the first."""
    seen: set[int] = set()
    for entry in flat.entries:
        if entry.part == part and entry.start < entry.stop and entry.start not in seen:
            seen.add(entry.start)
            yield entry


def _copy(state: State, offset: int, piece: Piece, held: Mapping[str, Tensor], keeper: str) -> int:
    """Copies what a state has of a piece; returns how many elements that were."""
    number = 0
    for key, values in held.items():
        found = state.get(f"{key}/{piece.entry.name}")
        if not isinstance(found, Tensor) or found.dim() != values.dim() or found.dtype is not values.dtype:
            expected = f"a flat tensor of {values.dtype}" if values.dim() else f"one {values.dtype}"
            raise RunDirectoryError(
                f"`{key}/{piece.entry.name}` is not what {keeper} has kept: expected {expected}"
            )
        if not values.dim():
            values.copy_(found)
            continue
        begin = piece.entry.start + offset
        a, b = max(piece.first, begin), min(piece.last, begin + len(found))
        if a < b:
            values[a - piece.first : b - piece.first] = found[a - begin : b - begin]
            number = b - a
    return number
