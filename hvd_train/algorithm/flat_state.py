"""The flat state: everything that is averaged is in one contiguous buffer per type, and the model's
parameters, its floating-point buffers and the optimizer's moments are views of it. Complex numbers are in the
buffer of their real type.

An average is then one call on one buffer: no copy in or out, no loop over tensors. Where parameters do not
become the mean, but move by a rule, they have buffers of their own, so that every rank owns as many of them.
What is averaged in every n-th round is in buffers of its own as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hvd_train.algorithm.averaged_tensors import is_averaged, model_tensors
from hvd_train.algorithm.optimizer_state import as_real, materialise, sparse_parameters
from hvd_train.algorithm.state_policy import OwnMoments, StatePolicy
from hvd_train.comm.base import Communicator
from hvd_train.comm.buffer import DTYPES, Buffer
from hvd_train.config.sync import BUFFERS, Policy
from hvd_train.errors import TaskError, ViewReplaced
from hvd_train.run.model_state import unusual
from hvd_train.tasks.inputs import constant_buffers

ALIGNMENT = 64
"""Bytes to which each tensor is aligned: a cache line, which also suits vector kernels. The same in
every backend, so that it cannot change a result."""


class Part(NamedTuple):
    """Which buffer of a flat state."""

    dtype: torch.dtype
    parameters: bool = False
    """Whether it has the parameters of this type, and nothing else."""
    every: int = 1
    """Rounds between two averages of what is in it."""
    moments: bool = False
    """Whether it has moments of the optimizer, and nothing else."""
    early: bool = False
    """Whether it has the parameters whose gradients are averaged before those of the others."""

    def is_due(self, rounds: int) -> bool:
        """Whether it is averaged in the round that follows `rounds` others."""
        return (rounds + 1) % self.every == 0


@dataclass(frozen=True)
class Entry:
    """One tensor of the flat state: where it is, and which tensor is a view of it."""

    name: str
    kind: Literal["parameter", "buffer", "moment"]
    holder: Tensor
    """The parameter, buffer or optimizer tensor, whose data is the view."""
    part: Part
    """The buffer that it is in."""
    start: int
    """Offset of its first element there."""
    size: tuple[int, ...]
    """Of the view; a complex tensor has one more dimension there, of 2."""
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the buffer: for a complex tensor its real type."""
        return self.part.dtype

    @property
    def stop(self) -> int:
        """Offset of the element after its last one."""
        return self.start + math.prod(self.size)


class FlatState:
    """Lays a model and its optimizer out in averaging buffers. The constructor plans the layout and is not
    collective; `place` then makes the buffers.

    Args:
        model: its trainable parameters and floating-point buffers become views. Frozen parameters and
            other buffers stay where they are: see `frozen`.
        optimizer: where a moment is averaged its state is created now, if it has none yet. The moments with
            the policy `average`, floating-point tensors with at least one dimension, become views.
        comm: where the buffers come from.
        optimizer_state: `average`, `keep` or `reset`.
        batch_norm: `average` or `keep`, for floating-point buffers of the model.
        moments: the same for single moments, in place of `optimizer_state`.
        every_rounds: rounds between two averages of a moment, or of `buffers`.
        parameters_apart: whether the parameters have buffers of their own.
        moments_apart: whether the moments have.
        early: those of the parameters, by name, that are apart from the others as well.

    Raises:
        TaskError: a tensor that cannot be laid out, named.
        ConfigError: a moment that the optimizer does not have, or a period of what is not averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        *,
        optimizer_state: Policy = "average",
        batch_norm: Literal["average", "keep"] = "average",
        moments: Mapping[str, Policy] | None = None,
        every_rounds: Mapping[str, int] | None = None,
        parameters_apart: bool = False,
        moments_apart: bool = False,
        early: Collection[str] = (),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._policy = StatePolicy(
            optimizer_state=optimizer_state,
            batch_norm=batch_norm,
            moments=moments or {},
            every_rounds=every_rounds or {},
        )
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        tensors = list(model_tensors(model, batch_norm == "average"))
        self._own_moments: OwnMoments | None = None
        if self.has_moments:
            tensors += self._averaged_moments()
        self.entries, self._numels = _lay_out(tensors, self._part_of(parameters_apart, moments_apart, early))
        self._comm = comm
        self.buffers: dict[Part, Buffer] = {}

    def _averaged_moments(self) -> list[tuple[str, str, Tensor]]:
        """Creates the optimizer's state, and remembers how moments begin that are not averaged."""
        names = {p: name for name, p in self.model.named_parameters()}
        found = list(materialise(self.optimizer, names, sparse_parameters(self.model)))
        keys = {key for _, key, _ in found}
        self._policy.check(keys, type(self.optimizer).__name__)
        if any(self._policy.of_moment(key) != "average" for key in keys):
            self._own_moments = OwnMoments(self.model, self.optimizer, self._policy)
        return [
            (f"{names[p]}/{key}", "moment", t)
            for p, key, t in found
            if self._policy.of_moment(key) == "average"
        ]

    def _part_of(
        self, parameters: bool, moments: bool, early: Collection[str]
    ) -> Callable[[str, str, torch.dtype], Part]:
        """Which buffer a tensor is in, by its name, its kind and its type."""

        def part(name: str, kind: str, dtype: torch.dtype) -> Part:
            if kind == "parameter":
                return Part(dtype, parameters, early=name in early)
            of = BUFFERS if kind == "buffer" else name.rpartition("/")[2]
            return Part(dtype, every=self._policy.every(of), moments=moments and kind == "moment")

        return part

    def place(self) -> None:
        """Moves every tensor, with the value that it has now, into buffers of the communicator.
        Collective."""
        self.buffers = {part: self._comm.buffer(self._numels[part], part.dtype) for part in self.parts}
        for entry in self.entries:
            view = self._view(entry)
            view.copy_(as_real(entry.holder))
            self._hand_over(entry, view)

    def rebind(self, comm: Communicator, *, in_every_step: bool = False) -> None:
        """Moves everything to buffers of `comm`, the communicator of the surviving ranks after some were
        lost. The values are those of the newest average that is complete in all buffers of the same period:
        what is averaged in every n-th round goes back to its own last average. Collective.

        Args:
            in_every_step: whether the parameters that have buffers of their own are averaged in every local
                step, moments that have not at all, and the others in every round.

        Raises `CommunicationError`, on every rank, where there is no such average.
        """
        apart = {part: in_every_step and (part.parameters or part.moments) for part in self.buffers}
        period = {part: (apart[part] and part.parameters, apart[part], part.every) for part in self.buffers}
        for same in sorted(set(period.values())):
            group = [part for part in self.buffers if period[part] == same]
            self.buffers |= zip(group, comm.recover([self.buffers[part] for part in group]), strict=True)
        self._comm = comm
        for entry in self.entries:
            self._hand_over(entry, self._view(entry))

    def _view(self, entry: Entry, of: Tensor | None = None) -> Tensor:
        base = self.buffers[entry.part].live if of is None else of
        return base.as_strided(entry.size, entry.stride, base.storage_offset() + entry.start)

    @staticmethod
    def _hand_over(entry: Entry, view: Tensor) -> None:
        entry.holder.data = torch.view_as_complex(view) if entry.holder.is_complex() else view

    @property
    def num_bytes(self) -> int:
        """Bytes of one copy of the state: what the average of a round in which all of it is due moves."""
        return sum(numel * part.dtype.itemsize for part, numel in self._numels.items())

    @property
    def parts(self) -> list[Part]:
        """The buffers that there are, in the order of `buffers`; also before they are placed."""
        return sorted(
            self._numels,
            key=lambda p: (DTYPES.index(p.dtype), not p.parameters, not p.early, p.every, p.moments),
        )

    def numel(self, part: Part) -> int:
        """Elements of a buffer."""
        return self._numels[part]

    def parameters_in(self, part: Part) -> int:
        """How many elements at the start of a buffer are those of parameters."""
        return max((e.stop for e in self.entries if e.part == part and e.kind == "parameter"), default=0)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the model that are not averaged but taken from rank 0: frozen parameters, and
        buffers that are integer, sparse, quantized, of a type that cannot be averaged, or constant."""
        inside = {e.holder.data_ptr() for e in self.entries if e.holder.numel()}
        for name, p in self.model.named_parameters():
            if not p.requires_grad and (unusual(p) or p.data_ptr() not in inside):
                yield name, p
        constant = constant_buffers(self.model)
        for name, b in self.model.named_buffers():
            if name in constant or not is_averaged(b):
                yield name, b

    def layout(self) -> list[str]:
        """One line per tensor: name, type, shape and place. Equal on all ranks, or they cannot average."""
        averaged = [f"{e.name} {e.dtype} {e.size} {e.stride} at {_place(e)}" for e in self.entries]
        return averaged + [f"{name} {t.dtype} {tuple(t.shape)} of rank 0" for name, t in self.frozen()]

    def check_views(self) -> None:
        """Takes the value of a buffer that the model assigned anew, as `self.mean = 0.9 * self.mean + ...`
        does, into the flat state. Raises `ViewReplaced`, naming the tensor, if another one is no longer
        where it was placed, or if a parameter was added or unfrozen since."""
        held = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for entry in self.entries:
            expected = self.buffers[entry.part].live.data_ptr() + entry.start * entry.dtype.itemsize
            seen = as_real(entry.holder)
            moved = seen.numel() > 0 and seen.data_ptr() != expected
            if entry.kind != "moment" and held.get(entry.name) is not entry.holder:
                moved |= not self._take_back(entry, held.get(entry.name))
            if moved or seen.stride() != entry.stride or seen.dtype is not entry.dtype:
                raise ViewReplaced(
                    f"{entry.kind} `{entry.name}` is no longer in the flat state: its data was replaced, "
                    "by load_state_dict(assign=True), .to(...), a change of memory format or the like. "
                    "Change it in place (`tensor.copy_`), or do it before the averager is made."
                )
        for name, p in self.model.named_parameters():
            if p.requires_grad and not self._trainable.get(name):
                did = "was unfrozen" if name in self._trainable else "appeared"
                raise ViewReplaced(
                    f"parameter `{name}` {did} after the flat state was laid out and is not averaged. "
                    "Make all parameters in build_model, and freeze there only what stays frozen; in your "
                    "own loop make a new averager."
                )
        self._check_moments()

    def _take_back(self, entry: Entry, value: Tensor | None) -> bool:
        """Copies `value`, which the model assigned in place of a buffer, into that buffer, and puts the
        buffer back. Returns whether that was possible."""
        holder = entry.holder
        if entry.kind != "buffer" or value is None or unusual(value):
            return False
        if value.shape != holder.shape or value.dtype is not holder.dtype:
            return False
        holder.data.copy_(value.detach())
        owner, _, name = entry.name.rpartition(".")
        self.model.get_submodule(owner)._buffers[name] = holder
        return True

    def _check_moments(self) -> None:
        """The optimizer may hold other tensors than those it held when they were laid out."""
        held = {id(t) for state in self.optimizer.state.values() for t in state.values()}
        for entry in self.entries:
            if entry.kind == "moment" and id(entry.holder) not in held:
                raise ViewReplaced(
                    f"optimizer state `{entry.name}` was replaced, by optimizer.load_state_dict or the like. "
                    "Load it before the averager is made."
                )

    def after_average(self, healthy: bool) -> None:
        """Clears moments of the optimizer that were not averaged and must not be kept: with the policy
        `reset`, and with `keep` on a rank whose values were not finite."""
        if self._own_moments is not None:
            self._own_moments.after_average(healthy)
        elif not self.has_moments and (self._policy.optimizer_state == "reset" or not healthy):
            self.optimizer.state.clear()

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's state was created, rather than being left to its first step."""
        return self._policy.tells_moments_apart

    def remark(self) -> str:
        """What the user should know of the periods and policies of the moments; empty if there is
        nothing."""
        return self._policy.remark({key for state in self.optimizer.state.values() for key in state})

    def resets(self, moment: str) -> bool:
        """Whether the moment with this name begins anew after each average."""
        return self._policy.of_moment(moment) == "reset"

    def moments(self) -> dict[str, Tensor]:
        """The tensors of the optimizer that are averaged in every round, by `parameter/key`."""
        return {e.name: e.holder for e in self.entries if e.kind == "moment" and e.part.every == 1}

    def own_buffers(self) -> dict[str, Tensor]:
        """The floating-point buffers of the model that are not averaged in every round, by name."""
        shared = {e.name for e in self.entries if e.part.every == 1} | {name for name, _ in self.frozen()}
        return {name: b for name, b in self.model.named_buffers() if name not in shared}


def _place(entry: Entry) -> str:
    """Where a tensor is, in words."""
    every = entry.part.every
    return str(entry.start) if every == 1 else f"{entry.start}, every {every} rounds"


def _lay_out(
    tensors: list[tuple[str, str, Tensor]], part_of: Callable[[str, str, torch.dtype], Part]
) -> tuple[list[Entry], dict[Part, int]]:
    """Places the tensors one after another in their buffers. Tensors that are the same memory under two names
    get one place; tensors that overlap in part are refused."""
    entries: list[Entry] = []
    numels: dict[Part, int] = {}
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, kind, holder in tensors:
        tensor = as_real(holder)
        size, stride = tuple(tensor.shape), _dense_stride(tensor)
        place = (tensor.data_ptr(), size, tuple(tensor.stride()))
        twin = places.get(place) if tensor.numel() else None
        if twin is None:
            step = ALIGNMENT // tensor.dtype.itemsize
            part = part_of(name, kind, tensor.dtype)
            start = -(-numels.get(part, 0) // step) * step
            numels[part] = start + tensor.numel()
            _refuse_overlap(name, tensor, spans)
        else:
            part, start, stride = twin.part, twin.start, twin.stride
        entry = Entry(name, kind, holder, part, start, size, stride)  # type: ignore[arg-type]
        places.setdefault(place, entry)
        entries.append(entry)
    return entries, numels


def _refuse_overlap(name: str, tensor: Tensor, spans: list[tuple[int, int, str]]) -> None:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    extent = reach + 1 if tensor.numel() else 0
    first, last = tensor.data_ptr(), tensor.data_ptr() + extent * tensor.dtype.itemsize
    for other_first, other_last, other in spans:
        if first < other_last and other_first < last:
            raise TaskError(
                f"`{name}` and `{other}` overlap in memory but are not the same tensor; tie parameters by "
                "giving both modules the same Parameter object."
            )
    spans.append((first, last, name))


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides if its elements fill its memory without gaps (channels_last, say), else
    those of a contiguous tensor of its shape."""
    dims = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return tuple(tensor.stride())
