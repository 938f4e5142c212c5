"""The same rows under two names: they would count twice, or be both trained on and evaluated on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

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


def _refusal(first: Origin, second: Origin, across: bool) -> str:
    if first.path == second.path:
        seen = f"{first.path}: named twice"
    elif first.file == second.file:
        seen = f"{second.path}: the same file as {first.path}, under another name"
    else:
        seen = f"{second.path}: the same rows as in {first.path}, by their checksums"
    if across:
        return f"{seen}. Expected no row to be both trained on and evaluated on: leave it out of one part."
    return f"{seen}. Expected every row once, or it counts twice: leave one of them out."
