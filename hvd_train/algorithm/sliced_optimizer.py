"""The configured optimizer on the slices of the parameters that this rank owns, with 1/p of its state.

S. Rajbhandari, J. Rasley, O. Ruwase and Y. He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", SC 2020, arXiv:1910.02054, section 5.1 (P_os): every rank keeps the optimizer's state of its part of
the parameters, and updates that part alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvd_train.algorithm.flat_state import Entry, FlatState, Part
from hvd_train.algorithm.optimizer_state import materialise
from hvd_train.algorithm.pieces import Piece, Pieces
from hvd_train.comm.base import Communicator
from hvd_train.errors import ConfigError, TaskError
from hvd_train.io.stateful import Count, State, checked

_BY_ELEMENT = (
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
)
"""Classes of torch.optim whose step on an element depends on no other element."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a `SlicedOptimizer` of one rank; the optimizer's tensors are beside it."""

    optimizer: str
    offsets: dict[str, Count]
    """For each parameter of which this rank owns a piece: where in the parameter's memory that begins."""


class Asked(NamedTuple):
    """Which key of the configuration asks for slices, for messages."""

    key: str
    instead: str
    """What does not."""


EVERY_STEP = Asked("sync.mode = 'gradients'", "sync.mode = 'average'")
IN_WARM_UP = Asked("sync.schedule = 'warmup'", "sync.schedule = 'fixed'")


class _Slice:
    """The slice of one buffer: its elements, and an optimizer of the pieces of parameters in it."""

    def __init__(self, pieces: Pieces, part: Part, whole: Optimizer) -> None:
        start, stop = pieces.owned[part]
        wide = part.dtype if part.dtype.itemsize >= 4 else torch.float32
        self.x = torch.zeros(stop - start, dtype=wide)
        self.version = 0
        """The number of the average that left `x`; 0: none did."""
        number = {e.start: i for i, e in enumerate(pieces.entries[part])}
        group_of = {p: i for i, group in enumerate(whole.param_groups) for p in group["params"]}
        self.parameters: dict[Piece, nn.Parameter] = {}
        self.numbers: list[int] = []
        """Of each piece, which parameter of the buffer it is of."""
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in whole.param_groups]
        for piece in pieces.of(part):
            own = nn.Parameter(pieces.inside(piece, self.x))
            groups[group_of[piece.entry.holder]]["params"].append(own)
            self.parameters[piece] = own
            self.numbers.append(number[piece.entry.start])
        known = inspect.signature(type(whole)).parameters
        arguments = {k: v for k, v in whole.defaults.items() if k in known}
        self.optimizer = type(whole)(groups, **arguments)
        names = {p: piece.entry.name for piece, p in self.parameters.items()}
        list(materialise(self.optimizer, names))
        self.gradients: list[Tensor] = []
        """Of each piece: views of the slice of the mean."""


@final
class SlicedOptimizer:
    """Steps the slices that this rank owns as `whole` would step all parameters. Stateful: each rank saves
    the state of its pieces; see `take` for how they come back.

    Args:
        flat: has buffers of the parameters alone (`parameters_apart`).
        whole: of the model's parameters. It does not step meanwhile, and its state is not touched; its groups
            are read in each step, so that a schedule may change them.
        asked: for it.

    Raises `ConfigError` for an optimizer that does not work element by element, and `TaskError` for two
    parameters in the same memory.
    """

    def __init__(
        self, flat: FlatState, comm: Communicator, whole: Optimizer, asked: Asked = EVERY_STEP
    ) -> None:
        self.asked = asked
        self.name = type(whole).__name__
        if self.name not in _BY_ELEMENT:
            raise ConfigError(
                f"optim.name = {self.name!r}: {asked.key} steps on slices of the parameters; "
                "expected an optimizer that works element by element: one of "
                f"{', '.join(_BY_ELEMENT)}. Choose one of these, or {asked.instead}."
            )
        _refuse_twins(flat, asked)
        self._flat = flat
        self._whole = whole
        self._begin(comm)

    def _begin(self, comm: Communicator) -> None:
        self._pieces = Pieces(self._flat, comm)
        self._slices = {part: _Slice(self._pieces, part, self._whole) for part in self._pieces.parts}

    @property
    def pieces(self) -> Pieces:
        """Those of this rank."""
        return self._pieces

    def place(self) -> None:
        """Finds the gradients, once the flat state is placed. Not collective."""
        for part, of in self._slices.items():
            mean = self._flat.buffers[part].owned
            of.gradients = [self._pieces.inside(piece, mean) for piece in of.parameters]

    def rebind(self, comm: Communicator) -> str:
        """Begins anew on the slices of this rank in `comm`, to which the flat state has moved. Returns what
        was lost, in words. Not collective."""
        self._begin(comm)
        return f"the state of {self.name} begins anew: that of the lost ranks was on them alone."

    @torch.no_grad()
    def step(self, part: Part, mean: Tensor, present: Sequence[bool]) -> None:
        """mean, a slice of the mean gradient, := that slice of x_(t+1). Not collective.

        Args:
            part: the buffer.
            mean: `owned` of that buffer.
            present: of each parameter in it, in the order of `Pieces.entries`, whether it has a gradient. One
                that has none stays as it is, as torch has it.
        """
        buffer, of = self._flat.buffers[part], self._slices[part]
        for own, group in zip(of.optimizer.param_groups, self._whole.param_groups, strict=True):
            own.update((key, value) for key, value in group.items() if key != "params")
        if of.version != buffer.version or of.x.dtype is not part.dtype:
            # The last average failed, or its result was rounded; else x is what the anchor has.
            of.x.copy_(buffer.anchor[buffer.start : buffer.stop])
        for p, gradient, number in zip(of.parameters.values(), of.gradients, of.numbers, strict=True):
            p.grad = gradient if present[number] else None
        of.optimizer.step()
        mean.copy_(of.x)
        of.version = buffer.version + 1

    def release(self) -> None:
        """Frees slices and state: from now on it saves nothing. Not collective."""
        self._slices.clear()

    def held(self, piece: Piece) -> Mapping[str, Tensor]:
        """The state of a piece: flat tensors, and counters of no dimension; empty once it is released."""
        of = self._slices.get(piece.entry.part)
        if of is None:
            return {}
        state = of.optimizer.state.get(of.parameters[piece], {})
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Any]:
        """The class, and the state of the pieces that this rank owns: flat tensors, and counters of no
        dimension."""
        return {"optimizer": self.name, **self._pieces.saved(self.held)}

    def load_state_dict(self, state: State) -> None:
        """Restores the state of a world of one rank; see `take` for others."""
        self.take([state])

    def take(self, states: Iterable[State]) -> None:
        """Restores what the ranks of a checkpoint have saved, whatever their number: see `Pieces.take`. Of
        another class it takes nothing, and a parameter that none has begins anew. Not collective.

        Raises `RunDirectoryError` for a state that `state_dict` does not give.
        """
        self._pieces.take(self._of_this_class(states), self.held, "the optimizer")

    def _of_this_class(self, states: Iterable[State]) -> Iterator[tuple[Mapping[str, int], State]]:
        for state in states:
            saved = checked({k: v for k, v in state.items() if not isinstance(v, Tensor)}, _Saved)
            if saved.optimizer != self.name:
                return
            yield saved.offsets, state


def _refuse_twins(flat: FlatState, asked: Asked) -> None:
    """Raises `TaskError` if two parameters are the same memory: each would have a gradient of its own."""
    first: dict[tuple[Part, int], Entry] = {}
    for entry in flat.entries:
        if entry.kind != "parameter" or entry.start == entry.stop:
            continue
        other = first.setdefault((entry.part, entry.start), entry)
        if other.holder is not entry.holder:
            raise TaskError(
                f"`{other.name}` and `{entry.name}` are two parameters in the same memory, which {asked.key} "
                "cannot step as one. Tie them by giving both modules the same Parameter object."
            )
