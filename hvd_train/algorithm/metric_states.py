"""Metrics of torchmetrics over all ranks: the communicator gathers their states, which are reduced in rank
order as each state declares.

torchmetrics' own way, torch.distributed, is not used: its collectives wait for a rank without a batch, and an
unweighted mean of means would be wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import (
    dim_zero_cat,
    dim_zero_max,
    dim_zero_mean,
    dim_zero_min,
    dim_zero_sum,
)

from hvd_train.comm.base import Communicator
from hvd_train.environment import machine
from hvd_train.errors import TaskError

Array: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = "float | list[Any]"
"""What a metric gives: a number, or numbers in nested lists."""

_REDUCTIONS: dict[object, str] = {
    dim_zero_sum: "sum",
    dim_zero_mean: "mean",
    dim_zero_min: "min",
    dim_zero_max: "max",
    dim_zero_cat: "cat",
    None: "none",
}
_FOLDS = ("sum", "mean", "min", "max")
_FOLDED_BYTES = 16 << 20
"""Bytes that a rank receives at a time."""
_SHARE_OF_MEMORY = 4
"""States that grow with the data may take 1 / this of a rank's share of the memory."""


@dataclass(frozen=True)
class _State:
    """One state of a metric, as a rank has it."""

    place: str
    """Of the metric: its name, and which metric inside it."""
    name: str
    reduction: str
    updates: int
    """Of the metric, on this rank: without one its states are not used."""
    shape: tuple[int, ...] | None
    """None for a list."""
    dtype: str
    num_bytes: int
    entries: int

    @property
    def declared(self) -> tuple[str, str, str]:
        """What must be the same on every rank."""
        return self.place, self.name, self.reduction

    @property
    def grows(self) -> bool:
        """Whether it grows with the data."""
        return self.shape is None or self.reduction == "cat"


class MetricStates:
    """The metrics that a task builds. The constructor is not collective.

    States that are sums or means become float64.

    Args:
        comm: the ranks that update the metrics, each with batches of its own, or with none.
        metrics: metrics and collections of them by name; the same on every rank.

    Raises `TaskError` for what is no metric, and for a state with a reduction of its own, by name.
    """

    def __init__(self, comm: Communicator, metrics: Mapping[str, Metric | MetricCollection]) -> None:
        self._comm = comm
        self._metrics = dict(metrics)
        for name, metric in self._metrics.items():
            if not isinstance(metric, (Metric, MetricCollection)):
                raise TaskError(
                    f"build_metrics gave {metric!r} for `{name}`; expected a torchmetrics.Metric or a "
                    "MetricCollection."
                )
            for leaf in (m for m in metric.modules() if isinstance(m, Metric)):
                _prepare(name, leaf)
        self.reset()

    def reset(self) -> None:
        """Forgets all updates. Not collective."""
        for metric in self._metrics.values():
            metric.reset()

    def of_this_rank(self) -> dict[str, Value]:
        """The values from this rank's own updates alone; empty without any. Not collective. Of one batch some
        may not be defined, of which torchmetrics would warn."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _values((key, m) for key, m in self._members() if _was_updated(m))

    def compute(self) -> dict[str, Value]:
        """The values by name, from the updates of all ranks. A metric that gives a dictionary has its keys as
        names. Collective; every rank gets the same.

        Lists of one entry an update come in the order of the batches, if rank r updates with batches r, r +
        p, ...; others in rank order. Afterwards the metrics are to be reset.

        Raises `TaskError`, on every rank, for metrics that differ between ranks, that no rank has updated, or
        whose states are too large.
        """
        if not self._metrics:
            return {}
        leaves = list(self._leaves())
        mine = [_describe(place, name, leaf) for place, leaf in leaves for name in leaf._defaults]
        by_rank = self._comm.allgather((mine, self._limit()))
        table = [states for states, _ in by_rank]
        _check(table, min(limit for _, limit in by_rank))
        owners = [leaf for _, leaf in leaves for _ in leaf._defaults]
        for leaf, *states in zip(owners, *table, strict=True):
            self._combine(leaf, states)
        values = None
        if self._comm.rank == 0:
            for leaf, *states in zip(owners, *table, strict=True):
                leaf._update_count = sum(state.updates for state in states)
            values = _values(self._members())
        return self._comm.broadcast(values) or {}

    def _members(self) -> Iterator[tuple[str, Metric]]:
        for name, metric in self._metrics.items():
            # Members of a collection may share states; `items` gives each its own.
            yield from metric.items() if isinstance(metric, MetricCollection) else [(name, metric)]

    def _leaves(self) -> Iterator[tuple[str, Metric]]:
        for key, member in self._members():
            for path, leaf in member.named_modules():
                if isinstance(leaf, Metric) and leaf._defaults:
                    yield f"{key}.{path}" if path else key, leaf

    def _limit(self) -> int:
        return machine.share_of_memory(self._comm.local_size) // _SHARE_OF_MEMORY

    def _combine(self, leaf: Metric, states: Sequence[_State]) -> None:
        """One state of all ranks, into the metric of rank 0. Collective."""
        name, reduction = states[0].name, states[0].reduction
        used = [state for state in states if state.updates]
        if not used:
            return
        value, mine = getattr(leaf, name), states[self._comm.rank]
        combined: Tensor | list[Tensor]
        if used[0].shape is None:
            combined = self._gather_list(value if mine.updates else [], states)
        elif reduction in _FOLDS:
            combined = self._fold(_array(value) if mine.updates else None, states)
        else:
            gathered = self._comm.allgather(_array(value) if mine.updates else None)
            tensors = [torch.from_numpy(array) for array in gathered if array is not None]
            tensors = [t if t.ndim or reduction == "none" else t.reshape(1) for t in tensors]
            combined = torch.stack(tensors) if reduction == "none" else torch.cat(tensors)
        if self._comm.rank == 0:
            setattr(leaf, name, combined)
            leaf._computed = None

    def _fold(self, mine: Array | None, states: Sequence[_State]) -> Tensor:
        used = next(state for state in states if state.updates)
        assert used.shape is not None
        reduction, weights = used.reduction, [state.updates for state in states]
        flat = np.zeros(int(np.prod(used.shape)), np.dtype(used.dtype))
        step = max(4096, _FOLDED_BYTES // flat.itemsize // self._comm.size)
        for start in range(0, len(flat), step):
            piece = None if mine is None else mine.reshape(-1)[start : start + step]
            pieces = self._comm.allgather(piece)
            flat[start : start + step] = _reduced(reduction, pieces, weights)
        return torch.from_numpy(flat.reshape(used.shape))

    def _gather_list(self, mine: Sequence[Tensor], states: Sequence[_State]) -> list[Tensor]:
        runs: list[list[Array]] = [[]] if mine else []
        room = step = max(1 << 16, _FOLDED_BYTES // self._comm.size)
        for array in map(_array, mine):
            if runs[-1] and array.nbytes > room:
                runs.append([])
                room = step
            runs[-1].append(array)
            room -= array.nbytes
        found: list[list[Tensor]] = [[] for _ in states]
        for i in range(max(self._comm.allgather(len(runs)))):
            for rank, run in enumerate(self._comm.allgather(runs[i] if i < len(runs) else [])):
                found[rank] += map(torch.from_numpy, run)
        in_order = all(state.entries == state.updates for state in states)
        if not in_order:
            return [entry for entries in found for entry in entries]
        rounds = range(max(len(entries) for entries in found))
        return [entries[i] for i in rounds for entries in found if i < len(entries)]


def _prepare(name: str, leaf: Metric) -> None:
    leaf.distributed_available_fn = lambda: False
    for state, reduction in leaf._reductions.items():
        if reduction not in _REDUCTIONS:
            raise TaskError(
                f"metric `{name}`: the state `{state}` of {type(leaf).__name__} has the reduction "
                f"{getattr(reduction, '__name__', reduction)!r}; expected sum, mean, min, max, cat or None. "
                "Use another metric, or keep the sums in `metrics`."
            )
        default, added = leaf._defaults[state], _REDUCTIONS[reduction] in ("sum", "mean")
        if added and isinstance(default, Tensor) and default.is_floating_point():
            leaf._defaults[state] = default.double()


def _describe(place: str, name: str, leaf: Metric) -> _State:
    value, reduction = getattr(leaf, name), _REDUCTIONS[leaf._reductions[name]]
    if isinstance(value, list):
        strange = [entry for entry in value if not isinstance(entry, Tensor)]
        if strange:
            raise TaskError(f"metric `{place}`: the state `{name}` holds {strange[0]!r}; expected tensors.")
        num_bytes = sum(entry.nbytes for entry in value)
        return _State(place, name, reduction, leaf._update_count, None, "", num_bytes, len(value))
    array = _array(value)
    return _State(place, name, reduction, leaf._update_count, array.shape, array.dtype.name, array.nbytes, 1)


def _check(table: Sequence[Sequence[_State]], limit: int) -> None:
    """Raises `TaskError` as `MetricStates.compute` says."""
    for rank, states in enumerate(table):
        if [s.declared for s in states] != [s.declared for s in table[0]]:
            raise TaskError(
                f"the metrics of build_metrics differ between rank 0 and rank {rank}; expected the same on "
                "every rank.",
                agreed=True,
            )
    for states in zip(*table, strict=True):
        used = [state for state in states if state.updates]
        place, name = states[0].place, states[0].name
        if not used:
            raise TaskError(
                f"metric `{place}` of build_metrics was not updated with any batch: call its update in "
                "`metrics` or `evaluate`.",
                agreed=True,
            )
        folded = used[0].reduction in (*_FOLDS, "none")
        shapes = {state.shape for state in used}
        if (folded or None in shapes) and len(shapes) > 1:
            raise TaskError(
                f"metric `{place}`: the state `{name}` has the shapes {sorted(map(str, shapes))} on "
                "different ranks; expected one.",
                agreed=True,
            )
        total = sum(state.num_bytes for state in used if state.grows)
        if total > limit:
            raise TaskError(
                f"metric `{place}` keeps every prediction in `{name}`: {total:,} bytes of all ranks, but "
                f"{limit:,} may be used. Give it a fixed number of thresholds or bins, or "
                "evaluate fewer rows.",
                agreed=True,
            )


def _reduced(reduction: str, pieces: Sequence[Array | None], weights: Sequence[int]) -> Array:
    """In rank order; a mean is weighted by the updates of each rank."""
    used = [(piece, weight) for piece, weight in zip(pieces, weights, strict=True) if piece is not None]
    total: Array = used[0][0].copy()
    if reduction == "mean":
        total *= used[0][1]
    for piece, weight in used[1:]:
        if reduction == "sum":
            total += piece
        elif reduction == "mean":
            total += piece * weight
        else:
            total = (np.minimum if reduction == "min" else np.maximum)(total, piece)
    if reduction == "mean":
        total /= sum(weight for _, weight in used)
    return total


def _array(tensor: Tensor) -> Array:
    dense = tensor.detach().cpu()
    if dense.dtype in (torch.bool, torch.bfloat16):
        dense = dense.long() if dense.dtype is torch.bool else dense.float()
    array: Array = dense.contiguous().numpy()
    return array


def _was_updated(metric: Metric) -> bool:
    return any(m._update_count for m in metric.modules() if isinstance(m, Metric))


def _values(members: Iterable[tuple[str, Metric]]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, member in members:
        value = member.compute()
        for key, part in value.items() if isinstance(value, dict) else [(name, value)]:
            if key in values:
                raise TaskError(f"two metrics of build_metrics are named `{key}`; give one another name.")
            values[key] = _plain(part)
    return values


def _plain(value: Any) -> Value:
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(value)


def scalars(values: Mapping[str, Value]) -> dict[str, float]:
    """Those that are one number."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def element(values: Mapping[str, Value], name: str) -> float | None:
    """The number that `name` means: `recall[3]` is entry 3 of `recall`. None if there is none."""
    head, bracket, rest = name.partition("[")
    value = values.get(head)
    index = rest.removesuffix("]")
    if not bracket or not isinstance(value, list) or not index.isdecimal() or int(index) >= len(value):
        return None
    found = value[int(index)]
    return found if isinstance(found, float) else None


def undefined(values: Mapping[str, Value]) -> list[str]:
    """The names of the numbers that are not defined, those of lists as `recall[3]`."""
    names = []
    for name, value in values.items():
        entries = value if isinstance(value, list) else []
        names += [f"{name}[{i}]" for i, entry in enumerate(entries) if entry != entry]
        if isinstance(value, float) and value != value:
            names.append(name)
    return names
