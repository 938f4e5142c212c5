"""The shards of one part, one after the other, and their place in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from hvd_train.data.format import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FieldSpec,
    Manifest,
    SampleSpec,
    ShardEntry,
)
from hvd_train.data.manifest import load_manifest, save_manifest
from hvd_train.data.scratch import locked
from hvd_train.data.shard_file import ShardBuilder, Storage
from hvd_train.data.sources.base import Block
from hvd_train.data.unfinished import Unfinished
from hvd_train.errors import DataError
from hvd_train.io.atomic import complete, temporary_beside

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Layout:
    """The shards of a part."""

    folder: Path
    part: Part
    sizes: Sequence[int]
    """Rows of each shard."""
    storage: Storage
    request: str
    """A digest of what was asked for."""

    @property
    def names(self) -> list[str]:
        """The names of the files."""
        return [shard_name(self.part, i, len(self.sizes)) for i in range(len(self.sizes))]

    def unfinished(self, scratch: Path | None = None) -> Unfinished:
        """What an earlier call left, with a folder for temporary files where it is changed."""
        fields = list(self.storage.fields)
        return Unfinished(self.folder, self.part, self.request, self.names, fields, scratch)


def shard_name(part: str, number: int, count: int) -> str:
    """The file name of one of `count` shards."""
    return f"{part}-{number:05d}-of-{count:05d}.h5"


def existing_shards(layout: Layout) -> list[Path]:
    """The files that writing would replace."""
    others = layout.unfinished().others
    return _listed_or_named(layout.folder, layout.part, [*layout.names, *others])


def _listed_or_named(folder: Path, part: Part, names: Sequence[str]) -> list[Path]:
    listed = [entry.file for entry in entries_of(load_manifest(folder), part)]
    return [folder / name for name in dict.fromkeys([*listed, *names]) if (folder / name).exists()]


@final
class PartWriter:
    """Takes the rows of a part in order, and writes its shards; those that are complete already are kept.

    Makes the folder; temporary files are in `scratch`. Raises `DataError` where the manifest's other part has
    other samples, OSError where the folder cannot be written.
    """

    def __init__(self, layout: Layout, scratch: Path) -> None:
        self._layout = layout
        self._scratch = scratch
        join(layout.folder, layout.part, layout.storage)
        layout.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = layout.unfinished(scratch)
        self._entries = self._unfinished.complete()
        self._num_classes = self._unfinished.num_classes
        self._unfinished.begin()
        self._skipped = self.num_complete_rows
        self._builder: ShardBuilder | None = None
        self._room = 0

    @property
    def scratch(self) -> Path:
        """For temporary files."""
        return self._scratch

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """That are written."""
        return self._layout.storage.fields

    @property
    def sizes(self) -> list[int]:
        """Rows of each shard."""
        return list(self._layout.sizes)

    @property
    def num_complete_rows(self) -> int:
        """Rows of the shards that are complete."""
        return sum(entry.num_samples for entry in self._entries)

    @property
    def is_complete(self) -> bool:
        """Whether all shards are."""
        return len(self._entries) == len(self._layout.sizes)

    def skip(self, num_rows: int) -> None:
        """Goes on as if so many rows of complete shards had been given."""
        self._skipped -= num_rows

    def append(self, block: Block) -> None:
        """Takes the next rows. Raises OSError."""
        count = len(next(iter(block.values())))
        at = min(self._skipped, count)
        self._skipped -= at
        while at < count:
            if self._builder is None:
                self._begin()
            rows = slice(at, min(count, at + self._room))
            at = rows.stop
            self._room -= rows.stop - rows.start
            assert self._builder is not None  # begun above
            self._builder.append({name: block[name][rows] for name in self.fields})
            if not self._room:
                self._end()

    def publish(self) -> Manifest:
        """Writes the manifest, after the last row, and removes what it replaces. Raises OSError."""
        layout = self._layout
        others = self._unfinished.others
        with locked(layout.folder):
            stale = set(_listed_or_named(layout.folder, layout.part, [*layout.names, *others]))
            manifest = listed(layout, self._entries, self._num_classes or None, self._scratch)
        # Only now, when nothing refers to them any more.
        for path in stale - {layout.folder / name for name in layout.names}:
            path.unlink(missing_ok=True)
        return manifest

    def end(self) -> None:
        """Forgets what a second call would have gone on with, after all parts are published."""
        self._unfinished.end()

    def abandon(self) -> None:
        """Removes a shard that is not complete. May be called twice, and after `publish`."""
        if self._builder is not None:
            self._builder.abandon()
            self._builder = None
            self._temporary.unlink(missing_ok=True)

    def _begin(self) -> None:
        number = len(self._entries)
        self._room = self._layout.sizes[number]
        self._temporary = temporary_beside(self._scratch / self._layout.names[number])
        self._builder = ShardBuilder(self._temporary, self._layout.storage, self._room)

    def _end(self) -> None:
        assert self._builder is not None  # it has all rows of its shard
        path = self._layout.folder / self._layout.names[len(self._entries)]
        entry = replace(self._builder.finish(), file=path.name)
        self._num_classes = max(self._num_classes, self._builder.num_classes or 0)
        # Recorded first: a file of this name is then known, even if this process ends in between.
        self._unfinished.add([entry], self._num_classes)
        complete(self._temporary, path)
        self._entries.append(entry)
        self._builder = None


def entries_of(manifest: Manifest | None, part: Part) -> tuple[ShardEntry, ...]:
    """The shards of a part."""
    if manifest is None:
        return ()
    return manifest.train if part == "train" else manifest.validation


def join(folder: Path, part: Part, storage: Storage) -> Manifest | None:
    """The manifest so far, None if it has nothing of the other part. Raises `DataError` unless the samples of
    that are like those of `storage`."""
    manifest = load_manifest(folder)
    if manifest is None or not entries_of(manifest, "validation" if part == "train" else "train"):
        return None
    theirs_of = {**vars(manifest.sample), "class names": manifest.class_names}
    ours: dict[str, Any] = {
        "fields": dict(storage.fields),
        "scale": 1.0 if storage.scale is None else storage.scale,
    }
    if storage.class_names and manifest.class_names:
        ours["class names"] = storage.class_names
    for key, value in ours.items():
        theirs = theirs_of[key]
        if value != theirs:
            raise DataError(
                f"{folder / MANIFEST_NAME}: the other part has {key} {theirs}, these samples have {value}. "
                "Expected the same in both parts: write them into another folder."
            )
    return manifest


def listed(layout: Layout, entries: Sequence[ShardEntry], num_classes: int | None, scratch: Path) -> Manifest:
    """Writes the manifest with these shards as the part, beside the other part. Its folder should be
    `locked`, and the temporary file is in `scratch`. Raises `DataError` and OSError."""
    storage = layout.storage
    before = join(layout.folder, layout.part, storage)
    known = before.sample.num_classes if before else None
    sample = SampleSpec(
        inputs=storage.inputs,
        targets=storage.targets,
        fields=dict(storage.fields),
        num_classes=max(num_classes or 0, known or 0) or None,
        scale=1.0 if storage.scale is None else storage.scale,
    )
    manifest = Manifest(sample=sample, class_names=storage.class_names)
    if before is not None:
        names = storage.class_names or before.class_names
        manifest = replace(before, schema=SCHEMA_VERSION, sample=sample, class_names=names)
    part = {layout.part: tuple(entries)}
    return save_manifest(layout.folder, replace(manifest, **part), scratch)  # type: ignore[arg-type]
