"""The slice step: what the owner of a slice does with the mean of its parameters before all ranks get it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from hvd_train.algorithm.distances import squared_distance
from hvd_train.algorithm.flat_state import Entry, FlatState, Part
from hvd_train.algorithm.outer import OuterRule
from hvd_train.comm.base import Communicator, OnSlice
from hvd_train.errors import ConfigError, RunDirectoryError
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
        self._parts = [part for part in flat.parts if part.parameters]
        self._keeps = () if rule is None else rule.keeps
        self._entries = {(e.part, e.start): e for e in reversed(flat.entries) if e.part in self._parts}
        self._taken: dict[Part, Tensor] = {}
        self._steps_before = 0
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
        self._comm = comm
        if self._rule is not None:
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

    def _pieces(self, part: Part) -> Iterator[tuple[Entry, int, int]]:
        """The parameters of which this rank owns a piece, and its [first, last) in the buffer."""
        start, stop = self._comm.owned(self._flat.numel(part))
        for entry in self._entries.values():
            first, last = max(start, entry.start), min(stop, entry.stop)
            if entry.part == part and first < last:
                yield entry, first, last

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and what the rule has kept of the pieces that this rank owns: flat tensors,
        views."""
        offsets: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        for part, buffer in self._flat.buffers.items():
            for entry, first, last in self._pieces(part) if buffer.kept is not None else ():
                offsets[entry.name] = first - entry.start
                for kept, values in zip(self._keeps, buffer.state, strict=True):
                    tensors[f"{kept}/{entry.name}"] = values[first - buffer.start : last - buffer.start]
        rule = "none" if self._rule is None else self._rule.name
        return {"rule": rule, "steps": self.steps, "offsets": offsets, **tensors}

    def load_state_dict(self, state: State) -> None:
        """Restores the state of a world of one rank; see `take` for others."""
        self.take([state])

    @torch.no_grad()
    def take(self, states: Iterable[State]) -> None:
        """Restores what the ranks of a checkpoint have saved, whatever their number: takes the pieces that
        this rank owns now, and reads no further state once it has them all. Of another rule it takes nothing,
        and a parameter that none has begins anew. Before the flat state is placed; not collective.

        Raises `RunDirectoryError` for a state that `state_dict` does not give.
        """
        rule = self._rule
        if rule is None:
            return
        wanted = {part: list(self._pieces(part)) for part in self._parts}
        missing = sum(last - first for pieces in wanted.values() for _, first, last in pieces)
        for part in self._parts:
            start, stop = self._comm.owned(self._flat.numel(part))
            wide = part.dtype if part.dtype.itemsize >= 4 else torch.float32
            self._taken[part] = torch.zeros(len(self._keeps), stop - start, dtype=wide)
        for state in states:
            saved = checked({k: v for k, v in state.items() if not isinstance(v, Tensor)}, _Saved)
            if saved.rule != rule.name:
                return
            self.steps = saved.steps
            for pieces in wanted.values():
                missing -= sum(self._take(state, saved, *piece) for piece in pieces)
            if missing == 0:
                return

    def _take(self, state: State, saved: _Saved, entry: Entry, first: int, last: int) -> int:
        """Copies what a state has of a piece; returns how many elements that were."""
        offset = saved.offsets.get(entry.name)
        if offset is None:
            return 0
        own, start = self._taken[entry.part], self._comm.owned(self._flat.numel(entry.part))[0]
        number = 0
        for values, kept in zip(own, self._keeps, strict=True):
            piece = state.get(f"{kept}/{entry.name}")
            if not isinstance(piece, Tensor) or piece.dim() != 1 or piece.dtype is not own.dtype:
                raise RunDirectoryError(
                    f"`{kept}/{entry.name}` is not what the outer optimizer has kept: expected a flat "
                    f"tensor of {own.dtype}"
                )
            begin = entry.start + offset
            a, b = max(first, begin), min(last, begin + len(piece))
            if a < b:
                values[a - start : b - start] = piece[a - begin : b - begin]
                number = b - a
        return number
