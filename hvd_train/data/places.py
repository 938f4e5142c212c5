"""Where the fields of a sample are in a file: datasets, columns of tables, parts of rows. Plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from hvd_train.config import DataConfig
from hvd_train.data.format import Coding, FieldSpec, Padding
from hvd_train.errors import DataError

_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?(?::([1-9]\d*))?")
_INDEX = re.compile(r"-?\d+")
_COLUMN = re.compile(r"[^\[\],:]+")
_PACKED = re.compile(r"packed\((.+),\s*(?:(offsets|starts|lengths)\s*=\s*)?([^\[\],()=]+)\)")
_EXPECTED = (
    "expected a dataset (`entry/data`), columns of a table (`table[x,y]`), a part of each sample "
    "(`spectrum[100:900]`, `image[0,:,::2]`), or rows of any length (`packed(values, offsets)`), with at "
    "most one `*` for every group there (`*/data`)"
)
GROUP = ":"
"""Between the name of a file and that of a group in it, where each group is a shard of its own."""

Cut = tuple[slice | int, ...]

Kind = Literal["offsets", "starts", "lengths"]


@dataclass(frozen=True)
class Bounds:
    """Where the rows are in a dataset that has the values of all rows, one row after the other."""

    dataset: str
    """Its path in the file."""

    kind: Kind = "offsets"
    """What it holds: of each row the values before it, and after the last row the number of all; the same
    without the last number; or the values of each row."""


@dataclass(frozen=True)
class Place:
    """One field of a sample in a file."""

    dataset: str
    """Its path in the file; a component `*` stands for any group."""

    columns: tuple[str, ...] = ()
    """Of a compound dataset: those that are read. Empty for any other dataset."""

    cut: Cut = ()
    """What is read of the axes of a sample, the first one first; an index removes its axis. Empty: all."""

    axis: int = 0
    """The axis of the dataset along which the samples are; negative ones count from the last."""

    coding: Coding | None = None
    """How its values become class numbers; None for values as they are."""

    follow_links: bool = False
    """Whether it may be in another file, which a link leads to, or a virtual dataset."""

    bounds: Bounds | None = None
    """Of rows of any length in `dataset`; None where a row is a row of `dataset`."""

    padding: Padding | None = None
    """Of rows of any length; None if such rows are refused."""

    @property
    def has_groups(self) -> bool:
        """Whether it is in any of several groups."""
        return "*" in self.dataset.split("/")

    def in_group(self, group: str) -> Place:
        """The place in one of the groups."""
        bounds = self.bounds and replace(self.bounds, dataset=_in_group(self.bounds.dataset, group))
        return replace(self, dataset=_in_group(self.dataset, group), bounds=bounds)

    def __str__(self) -> str:
        chosen = ",".join(self.columns or map(_text, self.cut))
        values = f"{self.dataset}[{chosen}]" if chosen else self.dataset
        if self.bounds is None:
            return values
        kind = "" if self.bounds.kind == "offsets" else f"{self.bounds.kind}="
        return f"packed({values}, {kind}{self.bounds.dataset})"


def _in_group(path: str, group: str) -> str:
    return "/".join(group if part == "*" else part for part in path.split("/"))


@dataclass(frozen=True)
class Places:
    """The fields of a sample in a file."""

    places: Mapping[str, Place]
    """By the name of the field."""

    inputs: str
    """The field whose recorded scale the header of a file tells."""

    targets: str
    """The field whose recorded class counts the header of a file tells."""

    masks: bool = False
    """Whether a field with rows of any length gets another one, which marks its values; see `mask_name`."""

    @property
    def has_groups(self) -> bool:
        """Whether each group of a file is a shard of its own."""
        return any(place.has_groups for place in self.places.values())

    @property
    def follow_links(self) -> bool:
        """Whether links to other files are followed."""
        return any(place.follow_links for place in self.places.values())

    def file_of(self, shard: str) -> tuple[str, str]:
        """The file of a shard, and the group in it, empty where the whole file is the shard."""
        if not self.has_groups:
            return shard, ""
        file, _, group = shard.rpartition(GROUP)
        return file, group


def parse_place(text: str, key: str, axis: int = 0, follow_links: bool = False) -> Place:
    """The place that `text` names: `NAME`, `NAME[COLUMN,...]` or `NAME[RANGE,...]`, with ranges as in numpy,
    or `packed(VALUES, BOUNDS)` with one of these as VALUES. Raises `DataError`, with `key` as the name of
    what the user gave."""
    if text.startswith("packed("):
        return _packed(text, key, axis, follow_links)
    dataset, bracket, rest = text.partition("[")
    parts = [part.strip() for part in rest[:-1].split(",")] if bracket else []
    ranges = [part for part in parts if _RANGE.fullmatch(part) or _INDEX.fullmatch(part)]
    whole = dataset.strip("/") and bool(bracket) == text.endswith("]") and dataset.split("/").count("*") < 2
    wrong = [part for part in parts if part not in ranges and not _COLUMN.fullmatch(part)]
    if not whole or wrong or len(ranges) not in (0, len(parts)):
        raise DataError(f"{key} = {text!r}: {_EXPECTED}.")
    if ranges:
        return Place(dataset, cut=tuple(map(_range, ranges)), axis=axis, follow_links=follow_links)
    return Place(dataset, columns=tuple(parts), axis=axis, follow_links=follow_links)


def _packed(text: str, key: str, axis: int, follow_links: bool) -> Place:
    found = _PACKED.fullmatch(text)
    values, kind, bounds = (part and part.strip() for part in found.groups()) if found else ("", "", "")
    place = parse_place(values, key, axis, follow_links) if values else None
    if place is None or place.bounds or not bounds.strip("/") or ("*" in bounds and not place.has_groups):
        raise DataError(f"{key} = {text!r}: {_EXPECTED}.")
    return replace(place, bounds=Bounds(bounds, cast(Kind, kind or "offsets")))


def _range(text: str) -> slice | int:
    if ":" not in text:
        return int(text)
    return slice(*(int(part) if part else None for part in text.split(":")))


def _text(part: slice | int) -> str:
    if isinstance(part, int):
        return str(part)
    bounds = [part.start, part.stop, *([] if part.step is None else [part.step])]
    return ":".join("" if bound is None else str(bound) for bound in bounds)


def plain(names: Sequence[str], max_length: int | None = None, *, follow_links: bool = False) -> Places:
    """Fields by their places, the inputs first and the targets last. Rows of any length are padded to
    `max_length`. Raises `DataError`."""
    places = {name: parse_place(name, "a dataset", follow_links=follow_links) for name in names}
    return Places(_padded(places, max_length), names[0], names[-1])


def _padded(places: Mapping[str, Place], length: int | None, truncate: bool = False) -> dict[str, Place]:
    padding = None if length is None else Padding(length=length, truncate=truncate)
    return {name: replace(place, padding=padding) for name, place in places.items()}


def places_of(data: DataConfig) -> Places:
    """As a configuration names them. Raises `DataError`."""
    common = (data.samples_axis, data.follow_links)
    places = {name: parse_place(text, f"data.fields.{name}", *common) for name, text in data.fields.items()}
    for key in ("inputs", "targets", "weights", "mask"):
        name = getattr(data, key)
        if name and name not in places:
            places[name] = parse_place(name, f"data.{key}", *common)
    if data.classes or data.one_hot or data.ignore_index is not None:
        coding = Coding(names=data.classes, ignored=data.ignore_index, one_hot=data.one_hot)
        places[data.targets] = replace(places[data.targets], coding=coding)
    places = _padded(places, data.max_length, data.truncate)
    return Places(places, data.inputs, data.targets, masks=data.max_length is not None)


def places_of_fields(fields: Mapping[str, FieldSpec], inputs: str = "", targets: str = "") -> Places:
    """As the fields of samples in other files. Raises `DataError`."""
    places = {
        name: replace(
            parse_place(field.place or name, f"`{name}`", field.axis, field.follow_links),
            coding=field.coding,
            padding=field.padding,
        )
        for name, field in fields.items()
    }
    return Places(places, inputs, targets)
