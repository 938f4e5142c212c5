"""A summary of the integers of a dataset, and whether they can be class numbers (or tokens).

Plain values and pure functions of arrays; nothing is read or printed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from hvd_train.data.format import Array, FieldSpec, SampleSpec, ShardInfo, is_class_dtype
from hvd_train.data.values import MOST_DISTINCT, Values
from hvd_train.errors import DataError

IGNORED = -100
"""Marks a target without a class: torch's `ignore_index`."""

MAX_CLASSES = 1 << 20
"""Up to here, beyond the usual vocabularies, every number of classes is accepted; above it, there must be at
least as many values as classes."""

_PIECE = 1 << 18
"""Values that are counted at once: numpy makes 64-bit integers of them."""


@dataclass(frozen=True)
class Extreme:
    """A smallest or largest value, and where it is."""

    value: int
    name: str
    """The dataset."""
    file: str
    row: int | None = None
    """Of the dataset; None if only the file is known."""

    def __str__(self) -> str:
        where = "" if self.row is None else f" in row {self.row}"
        return f"{self.file}: `{self.name}` holds {self.value}{where}"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of some integers. Those that are ignored are left out."""

    count: int = 0
    """Values."""

    lowest: Extreme | None = None
    highest: Extreme | None = None
    """None if there is no value."""

    different: frozenset[int] | None = frozenset()
    """The different values; None if there are more than 1,000."""

    @property
    def num_classes(self) -> int:
        """The largest value plus one, as the classes are 0, 1, 2, ...; at least 1."""
        return max(1, self.highest.value + 1) if self.highest else 1


def divisor(most: int, dtype: str) -> int:
    """What integers up to a magnitude of `most` are divided by to be about 1: the largest value of their type
    where they reach into its upper half, else `most`."""
    full = int(np.iinfo(np.dtype(dtype)).max)
    return full if most > full // 2 else most


def labels_of(
    values: Array,
    name: str,
    file: str,
    first_row: int = 0,
    *,
    ignore: bool = True,
    marks: Array | None = None,
) -> Labels:
    """Of a block of integers or booleans, [rows, ...].

    Args:
        name: of the dataset.
        first_row: number of the block's first row in the file.
        ignore: leave out those that are `IGNORED`.
        marks: of rows that are padded, where they have values: [rows, length] booleans.
    """
    flat = values.reshape(-1)
    width = max(1, flat.size // max(1, len(values)))
    places = None
    if marks is not None or (ignore and flat.size and flat.min() < 0):
        counts = np.ones(flat.size, bool) if marks is None else marks.repeat(flat.size // marks.size)
        places = np.flatnonzero(counts & (flat != IGNORED) if ignore else counts)
        flat = flat[places]
    if not flat.size:
        return Labels()

    def extreme(at: int) -> Extreme:
        place = at if places is None else int(places[at])
        return Extreme(int(flat[at]), name, file, first_row + place // width)

    low, high = extreme(int(flat.argmin())), extreme(int(flat.argmax()))
    wide = low.value < 0 or high.value >= MAX_CLASSES
    found = np.unique(flat) if wide else _present(flat, high.value + 1)
    different = _at_most(frozenset(found[: MOST_DISTINCT + 1].tolist()))
    return Labels(count=flat.size, lowest=low, highest=high, different=different)


def _present(values: Array, num_classes: int) -> Array:
    """The different values of integers from 0 up to `num_classes` - 1: faster than sorting them."""
    present = np.zeros(num_classes, bool)
    for start in range(0, values.size, _PIECE):
        piece = values[start : start + _PIECE].astype(np.intp)
        present |= np.bincount(piece, minlength=num_classes) > 0
    return np.flatnonzero(present)


def labels_of_counts(counts: tuple[int, ...], name: str, file: str) -> Labels:
    """Of values whose number in each class is recorded."""
    present = np.flatnonzero(counts)
    if not present.size:
        return Labels()
    return Labels(
        count=sum(counts),
        lowest=Extreme(int(present[0]), name, file),
        highest=Extreme(len(counts) - 1, name, file),
        different=_at_most(frozenset(present[: MOST_DISTINCT + 1].tolist())),
    )


def labels_of_header(info: ShardInfo, targets: str) -> Labels | None:
    """What the class counts of a shard say of its dataset `targets`; None if it records none, or holds values
    that are not counted."""
    counts = info.class_counts
    if counts is None or sum(counts) != info.num_samples * prod(info.fields[targets].shape):
        return None
    return labels_of_counts(counts, targets, info.path)


def labels_of_values(values: Values, name: str, file: str) -> Labels:
    """Of integers that are known by their summary, without those that are `IGNORED` if that was its fill
    value."""
    if values.lowest is None or values.highest is None:
        return Labels()
    return Labels(
        count=values.finite,
        lowest=Extreme(int(values.lowest), name, file),
        highest=Extreme(int(values.highest), name, file),
        different=None if values.counts is None else frozenset(values.counts),
    )


def join(labels: Iterable[Labels]) -> Labels:
    """The summary of all of them together; of equal extremes the first is kept."""
    return reduce(_join_two, labels, Labels())


def _join_two(a: Labels, b: Labels) -> Labels:
    lows = [x for x in (a.lowest, b.lowest) if x]
    highs = [x for x in (a.highest, b.highest) if x]
    return Labels(
        count=a.count + b.count,
        lowest=min(lows, key=lambda x: x.value, default=None),
        highest=max(highs, key=lambda x: x.value, default=None),
        different=None if a.different is None or b.different is None else _at_most(a.different | b.different),
    )


def _at_most(values: frozenset[int]) -> frozenset[int] | None:
    return values if len(values) <= MOST_DISTINCT else None


def objection(labels: Labels, name: str, path: str, *, tokens: bool = False) -> str:
    """Why these values cannot be class numbers, and what to do; empty if they can.

    Args:
        name, path: the dataset, and where it is, for the case that it has no value that counts.
        tokens: they are meant as tokens.
    """
    low, high, classes = labels.lowest, labels.highest, labels.num_classes
    expected = f"expected {'tokens' if tokens else 'class numbers'} 0, 1, 2, ..."
    if low is None or high is None:
        return f"{path}: every value of `{name}` is {IGNORED}, which marks targets to ignore; {expected}"
    if low.value < 0:
        seen = str(low)
    elif classes > max(MAX_CLASSES, labels.count):
        several = f"more than {MOST_DISTINCT:,}" if labels.different is None else f"{len(labels.different):,}"
        seen = f"{high}: {classes:,} classes for {labels.count:,} values, {several} of them different"
    else:
        return ""
    if tokens:
        remedy = f"Number the tokens from 0. Only a separate dataset of targets may hold {IGNORED}."
    else:
        remedy = f"{_numbering(low, high, labels.different)}, or take task = 'regression' for a quantity."
    return f"{seen}; {expected} {remedy}"


def _numbering(low: Extreme, high: Extreme, different: frozenset[int] | None) -> str:
    """How to make class numbers of other values."""
    if (low.value, high.value) == (-1, 1) and different == frozenset((-1, 1)):
        return "Set data.classes = ['-1', '1'], or write them as 0 and 1"
    mark = (
        f"set data.ignore_index = {low.value} if that marks targets without a class, "
        if low.value < 0
        else ""
    )
    return (
        f"List the values that are classes in data.classes, {mark}number them from 0, as "
        f"numpy.unique({low.name}, return_inverse=True)[1] does"
    )


def misfit(name: str, field: FieldSpec) -> str:
    """Why a dataset of this type and shape is not one class number a sample, and what to do; empty if it
    is."""
    if field.shape not in ((), (1,)):
        return (
            f"`{name}` has the shape {list(field.shape)} a sample; expected one integer a sample. Set "
            "data.one_hot = true if each row has a 1 for its class and else 0, name another dataset in "
            "data.targets, or take `regression`."
        )
    if not is_class_dtype(field.dtype):
        return (
            f"`{name}` is of type {field.dtype}; expected integers from 0 on. List the values that "
            "are classes in data.classes, such as ['0', '1'], name another dataset in data.targets, or take "
            "`regression`."
        )
    return ""


class Unclassed(SampleSpec):
    """A sample whose integer targets cannot be class numbers. Reading `num_classes` raises `DataError` with
    the reason: a task that asks for it cannot be trained, one that does not can."""

    def __init__(self, spec: SampleSpec, reason: str) -> None:
        self.__dict__.update(vars(spec))
        self.__dict__["_reason"] = reason

    def __getattribute__(self, attribute: str) -> Any:
        if attribute == "num_classes":
            raise DataError(object.__getattribute__(self, "_reason"))
        return object.__getattribute__(self, attribute)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_json()})"
