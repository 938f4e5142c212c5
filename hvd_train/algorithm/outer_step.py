"""The slice step: what the owner of a slice does with the mean of its parameters before all ranks get it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from hvd_train.algorithm.distances import squared_distance
from hvd_train.algorithm.flat_state import FlatState, Part
from hvd_train.algorithm.outer import OuterRule
from hvd_train.algorithm.pieces import Piece, Pieces
from hvd_train.comm.base import Communicator, OnSlice
from hvd_train.errors import ConfigError
from hvd_train.io.stateful import Count, State, checked
from hvd_train.io.text import listed


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an `OuterStep` of one rank; the kept values of its slice are tensors beside it."""

    rule: str
    steps: Count
    offsets: dict[str, Count]
    """For each parameter of which this rank owns a piece: where in the parameter's memory that begins."""


class OuterStep:
    """Clips the mean change of the parameters, and moves them by the rule of an outer optimizer. The rest of
    the flat state is plainly averaged.

    Where it does anything, the parameters must have buffers of their own (`parameters_apart` of `FlatState`),
    so that each rank owns 1/p of them, and of what the rule keeps. Stateful: each rank saves the pieces that
    it owns; see `take` for how they come back.

    Args:
        rule: of the outer optimizer; None: x_(t+1) is the mean.
        clip: the largest 2-norm of mean - x_t over all parameters; 0: it is not clipped.

    Raises `ConfigError` for `clip` with parameters of several types.
    """

    def __init__(
        self, flat: FlatState, comm: Communicator, rule: OuterRule | None, clip: float = 0.0
    ) -> None:
        self._flat = flat
        self._comm = comm
        self._rule = rule
        self._clip = clip
        self._pieces = Pieces(flat, comm)
        self._parts = self._pieces.parts
        self._keeps = () if rule is None else rule.keeps
        self._taken: dict[Part, Tensor] = {}
        self._steps_before: int | None = None
        """`steps` before the first average of the buffers; None: no step can have been taken yet."""
        self.steps = 0
        """Outer steps done; the same on every rank."""
        self.moved: dict[Part, float] = {}
        """||mean - x_t||^2 over the elements that this rank owns, where the last average measured it."""
        if clip and len(self._parts) > 1:
            types = " and ".join(str(part.dtype) for part in self._parts)
            raise ConfigError(
                f"sync.clip = {clip}: the model has parameters of {types}, which are averaged one type after "
                "the other; expected parameters of one type, so that the norm of all is known. Set sync.clip "
                "= 0."
            )

    @property
    def is_on(self) -> bool:
        """Whether it does anything."""
        return self._rule is not None or self._clip > 0

    def place(self) -> None:
        """Makes the memory of what the rule keeps, once the flat state is placed and x_0 is averaged.
        Collective."""
        for part in self._parts if self._keeps else ():
            buffer = self._flat.buffers[part]
            self._comm.keep_state(buffer, len(self._keeps))
            if part in self._taken:
                buffer.state.copy_(self._taken.pop(part))
        self._steps_before = self.steps - self._number()

    def _number(self) -> int:
        """That of the newest average of the parameters, which is the same in all of their buffers."""
        return next((self._flat.buffers[part].version for part in self._parts), 0)

    def rebind(self, comm: Communicator) -> str:
        """Goes on in `comm`, to which the flat state has moved with what the rule keeps, from the average
        that it holds now. Returns what was lost, in words; empty if nothing was. Not collective."""
        self._comm, self._pieces = comm, Pieces(self._flat, comm)
        if self._steps_before is not None:
            self.steps = self._steps_before + self._number()
        kept = [self._flat.buffers[part].kept for part in self._parts if self._keeps]
        lost = sum(state.lost for state in kept if state is not None)
        if not lost:
            return ""
        whole = sum(self._flat.numel(part) for part in self._parts)
        return (
            f"{listed(self._keeps)} of the outer optimizer for {lost / whole:.1%} of the parameters was on "
            "lost ranks alone: it begins again at 0."
        )

    def on_slice(self, part: Part, measure: bool) -> OnSlice | None:
        """The slice step of a buffer in the average that begins now; None if it has none.

        Args:
            measure: whether to measure how far the mean has moved.
        """
        self.moved.pop(part, None)
        if part not in self._parts or not self.is_on:
            return None
        return lambda mean, start: self._step(part, mean, measure)

    @torch.no_grad()
    def _step(self, part: Part, mean: Tensor, measure: bool) -> None:
        buffer = self._flat.buffers[part]
        x = buffer.anchor[buffer.start : buffer.stop].to(mean.dtype)
        if measure or self._clip:
            self.moved[part] = squared_distance(mean, x)
        if self._clip:
            self._shorten(mean, x, self.moved[part])
        if self._rule is not None:
            kept = buffer.next_state.copy_(buffer.state) if self._keeps else ()
            named = dict(zip(self._keeps, kept, strict=True))
            local_lr = float(self._flat.optimizer.param_groups[0]["lr"])
            self._rule.step(x, mean, named, self._rule.lr_at(self.steps), local_lr)

    def _shorten(self, mean: Tensor, x: Tensor, squared: float) -> None:
        """Collective: the squared norms of all slices, one number a rank, are gathered, so that every rank
        adds up the same numbers."""
        norm = math.sqrt(math.fsum(self._comm.gather_values([squared])[:, 0]))
        if norm > self._clip:
            mean.sub_(x).mul_(self._clip / norm).add_(x)

    def after_average(self, any_weight: bool) -> None:
        """Counts the step. Not collective."""
        if any_weight and self._rule is not None:
            self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and what the rule has kept of the pieces that this rank owns: flat tensors,
        views."""
        rule = "none" if self._rule is None else self._rule.name
        return {"rule": rule, "steps": self.steps, **self._pieces.saved(self._kept)}

    def _kept(self, piece: Piece) -> Mapping[str, Tensor]:
        buffer = self._flat.buffers.get(piece.entry.part)
        if buffer is None or buffer.kept is None:
            return {}
        return dict(zip(self._keeps, self._pieces.inside(piece, buffer.state), strict=True))

    def load_state_dict(self, state: State) -> None:
        """Restores the state of a world of one rank; see `take` for others."""
        self.take([state])

    def take(self, states: Iterable[State]) -> None:
        """Restores what the ranks of a checkpoint have saved, whatever their number: see `Pieces.take`. Of
        another rule it takes nothing, and a parameter that none has begins anew. Before the flat state is
        placed; not collective.

        Raises `RunDirectoryError` for a state that `state_dict` does not give.
        """
        if self._rule is None:
            return
        for part, (start, stop) in self._pieces.owned.items():
            wide = part.dtype if part.dtype.itemsize >= 4 else torch.float32
            self._taken[part] = torch.zeros(len(self._keeps), stop - start, dtype=wide)
        self._pieces.take(self._of_this_rule(states), self._place_of, "the outer optimizer")

    def _of_this_rule(self, states: Iterable[State]) -> Iterator[tuple[Mapping[str, int], State]]:
        for state in states:
            saved = checked({k: v for k, v in state.items() if not isinstance(v, Tensor)}, _Saved)
            if self._rule is None or saved.rule != self._rule.name:
                return
            self.steps = saved.steps
            yield saved.offsets, state

    def _place_of(self, piece: Piece) -> Mapping[str, Tensor]:
        taken = self._pieces.inside(piece, self._taken[piece.entry.part])
        return dict(zip(self._keeps, taken, strict=True))
