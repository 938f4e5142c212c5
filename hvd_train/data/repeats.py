"""The same rows under two names: they would count twice, or be both trained on and evaluated on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from hvd_train.data.hdf5.selections import Stretch
from hvd_train.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What identifies the rows of a shard."""

    path: str

    file: Hashable
    """The file itself, whatever its name, and the group in it."""

    contents: str
    """A hash of the recorded checksums of its rows; empty without them: reading all rows would take long."""

    manifest: str
    """Folder of the manifest that lists it; empty if none does."""

    stretches: tuple[Stretch, ...] = ()
    """Where its inputs are, in whatever file; empty unless links are followed."""


def refuse_repeats(train: Sequence[Origin], validation: Sequence[Origin]) -> None:
    """Raises `DataError`, with both names, where two shards are one file or hold the same rows.

    Shards of one part that one manifest lists may be equal: they were written that way.
    """
    files: dict[Hashable, Origin] = {}
    contents: dict[str, Origin] = {}
    trained = {id(origin) for origin in train}
    for origin in (*train, *validation):
        twin = files.setdefault(origin.file, origin)
        if twin is origin and origin.contents:
            twin = contents.setdefault(origin.contents, origin)
            together = origin.manifest and origin.manifest == twin.manifest
            if together and (id(twin) in trained) == (id(origin) in trained):
                continue
        if twin is not origin:
            raise DataError(_refusal(twin, origin, id(twin) in trained and id(origin) not in trained))
    for twin, origin, where in _shared((*train, *validation)):
        seen = f"{origin.path}: its inputs and those of {twin.path} are the same rows of {where}"
        raise DataError(_expected(seen, id(twin) in trained and id(origin) not in trained))


def _shared(origins: Sequence[Origin]) -> Iterator[tuple[Origin, Origin, str]]:
    """Every two shards that links lead to the same rows of a dataset, and which one that is."""
    places: dict[Hashable, list[tuple[int, Stretch]]] = {}
    for number, origin in enumerate(origins):
        for stretch in origin.stretches:
            places.setdefault(stretch.dataset, []).append((number, stretch))
    for stretches in places.values():
        if len({number for number, _ in stretches}) < 2:
            continue
        intervals = [(number, *map(int, i)) for number, s in stretches for i in s.intervals()]
        stops: dict[int, int] = {}
        for number, start, stop in sorted(intervals, key=lambda interval: interval[1:]):
            for other, end in stops.items():
                if other != number and end > start:
                    first, second = sorted((number, other))
                    yield origins[first], origins[second], stretches[0][1].where
            stops[number] = max(stop, stops.get(number, 0))


def _refusal(first: Origin, second: Origin, across: bool) -> str:
    if first.path == second.path:
        seen = f"{first.path}: named twice"
    elif first.file == second.file:
        seen = f"{second.path}: the same file as {first.path}, under another name"
    else:
        seen = f"{second.path}: the same rows as in {first.path}, by their checksums"
    return _expected(seen, across)


def _expected(seen: str, across: bool) -> str:
    if across:
        return f"{seen}. Expected no row to be both trained on and evaluated on: leave it out of one part."
    return f"{seen}. Expected every row once, or it counts twice: leave one of them out."
