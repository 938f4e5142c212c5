"""What the mappings of a virtual dataset lead to: every one is resolved and checked before rows are read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, final

import h5py

from hvd_train.data.hdf5.explained import CHANGED, explained
from hvd_train.data.hdf5.filters import require_filters
from hvd_train.data.hdf5.following import LinkedFiles
from hvd_train.data.hdf5.links import find
from hvd_train.data.hdf5.packing import require_same_packing
from hvd_train.data.hdf5.recipes import by_h5py
from hvd_train.data.hdf5.selections import Axis, Selection, inner_size, selection_of, whole
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import shown

_MAX_DEPTH = 8
"""Virtual datasets that have one another as sources."""

_SUBSTITUTE = re.compile("%([%b])")


@final
@dataclass(frozen=True)
class Source:
    """A dataset that a virtual one has values of."""

    path: str
    """The file that the mapping names."""

    name: str
    """The dataset, as the mapping names it."""

    file: str
    """The file that has it: another one if `name` leads through an external link."""

    shape: tuple[int, ...]

    chunk_rows: int
    """Rows of a chunk; 0 if it has none."""

    filtered: bool

    depth: int
    """Of the virtual dataset that has it as a source."""

    identity: tuple[int, int, int]
    """Of the dataset, whatever its names: device, inode, address in the file."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}: dataset `{shown(self.name.strip('/'))}`"

    def row_bytes(self, itemsize: int) -> int:
        """Bytes of one row, of values of so many bytes."""
        return prod(self.shape[1:]) * itemsize

    def open(self, files: LinkedFiles) -> h5py.Dataset:
        """The dataset. Raises `DataError` where it is not what it was."""
        dataset = find(files.open(self.path), self.name, self.path, files)
        if not isinstance(dataset, h5py.Dataset) or dataset.shape[1:] != self.shape[1:]:
            raise DataError(f"{self.where} was replaced after it was first read: start the run again.")
        return dataset


@final
@dataclass(frozen=True)
class Mapping:
    """Which values of a source are which ones of a virtual dataset: as many, in the order of both."""

    source: Source
    chosen: Selection
    """Of the source."""
    virtual: Selection
    """Of the virtual dataset."""
    has_whole_rows: bool
    """Whether a row of the source is one of the virtual dataset."""

    @property
    def stop(self) -> int:
        """The virtual row after the last one."""
        return self.virtual[0].stop(self.virtual[0].size or 0)

    @property
    def rows_of_source(self) -> int:
        """Rows of the source that a virtual row has values of, at most."""
        return -(-inner_size(self.virtual) // max(1, inner_size(self.chosen)))

    @property
    def chunk_rows(self) -> int:
        """Virtual rows that have values of one chunk of the source; 0 without chunks."""
        rows = self.source.chunk_rows * inner_size(self.chosen) // max(1, inner_size(self.virtual))
        return max(1, rows) if self.source.chunk_rows else 0


def mappings_of(dataset: h5py.Dataset, files: LinkedFiles, depth: int) -> list[Mapping]:
    """All mappings of a virtual dataset; those that grow with their sources as far as these go now.

    Args:
        files: opens the files of the sources, for as long as they are checked.
        depth: 1 for the dataset that is read, 2 for one of its sources, ...

    Raises `UnsupportedShard` for a source that is not to be read, or is not laid out by rows, and `DataError`
    for one that is missing or too short: every value of the virtual dataset that has a source is there.
    """
    resolver = _Resolver(dataset, files, depth)
    plan = dataset.id.get_create_plist()
    mappings = [m for i in range(plan.get_virtual_count()) for m in resolver.resolve(plan, i)]
    resolver.refuse_writers()
    shape = tuple(map(int, dataset.shape))
    rows = max((m.stop for m in mappings), default=0)
    resolver.require_complete(rows)
    if resolver.grows and rows != shape[0]:
        raise DataError(
            f"{resolver.where} has {shape[0]} rows, and {rows} in its sources, which were written to "
            "meanwhile. Wait for the program that writes them."
        )
    return [
        replace(m, has_whole_rows=_is_whole(m.chosen, m.source.shape) and _is_whole(m.virtual, shape))
        if m.source.shape[1:] == shape[1:]
        else m
        for m in mappings
    ]


def _is_whole(selection: Selection, shape: tuple[int, ...]) -> bool:
    return selection[1:] == whole(shape)[1:] or all(
        axis.is_contiguous and axis.start == 0 and axis.size == length
        for axis, length in zip(selection[1:], shape[1:], strict=True)
    )


class _Resolver:
    """Resolves the mappings of one virtual dataset."""

    def __init__(self, dataset: h5py.Dataset, files: LinkedFiles, depth: int) -> None:
        self._dataset = dataset
        self._home = dataset.file.filename
        self._name = dataset.name.strip("/")
        self._what = f"virtual dataset `{shown(self._name)}`"
        self.where = f"{self._home}: {self._what}"
        self._files = files
        self._depth = depth
        self._sources: dict[tuple[str, str], Source] = {}
        self._growing: list[tuple[Axis, Source, int]] = []
        """Along the rows of the virtual dataset, how many of them the source has."""
        self._blocks: list[tuple[Axis, str, str, int]] = []
        """Those of which every block is a source, the names of the sources, and how many there are."""
        self._written = ""
        """A source file that a program is writing; empty if there is none."""
        if depth > _MAX_DEPTH:
            raise self._refusal(f"is {depth} virtual datasets deep, as a cycle of them is")

    @property
    def grows(self) -> bool:
        """Whether the number of rows depends on the sources."""
        return bool(self._growing or self._blocks)

    def resolve(self, plan: Any, number: int) -> Iterator[Mapping]:
        """One mapping, as it is in the file; one for each block if its sources are numbered."""
        virtual, chosen = (
            selection_of(space)
            for space in (plan.get_virtual_vspace(number), plan.get_virtual_srcspace(number))
        )
        file, name = plan.get_virtual_filename(number), plan.get_virtual_dsetname(number)
        if not virtual or chosen is None:
            raise self._refusal("has mappings that are no regular selections")
        if any(axis.size is None for axis in (*virtual[1:], *chosen[1:])):
            raise self._refusal("grows along another axis than the first")
        if virtual[0].size is not None:
            yield self._fixed(virtual, chosen, _numbered(file, None), _numbered(name, None))
        elif chosen and chosen[0].size is None:
            yield self._endless(virtual, chosen, _numbered(file, None), _numbered(name, None))
        else:
            count = self._count(file, name)
            self._blocks.append((virtual[0], file, name, count))
            for block in range(count):
                axis = virtual[0]
                first = Axis(axis.start + block * axis.stride, 1, 1, axis.block)
                yield self._fixed(
                    (first, *virtual[1:]), chosen, _numbered(file, block), _numbered(name, block)
                )

    def refuse_writers(self) -> None:
        """Raises `UnsupportedShard` if the number of rows depends on a file that a program is writing."""
        if self.grows and self._written:
            raise UnsupportedShard(
                f"{self.where} grows with {self._written}, which a program is writing (SWMR). Expected "
                "sources that are complete: wait for that program, or name that file as the shard."
            )

    def require_complete(self, rows: int) -> None:
        """Raises `DataError` if a mapping that grows has fewer than `rows` rows of the virtual dataset."""
        for axis, source, count in self._growing:
            if count < axis.below(rows):
                raise self._too_short(source, f"{count} rows, but {axis.below(rows)}")
        for axis, file, name, count in self._blocks:
            if axis.start + count * axis.stride < rows:
                self._source(_numbered(file, count), _numbered(name, count))

    def _fixed(self, virtual: Selection, chosen: Selection, file: str, name: str) -> Mapping:
        source = self._source(file, name)
        chosen = chosen or whole(source.shape)
        if len(chosen) != len(source.shape):
            raise self._refusal(f"takes {len(chosen)} axes of {source.where}, which has {len(source.shape)}")
        for axis, length in zip(chosen, source.shape, strict=True):
            if axis.stop(axis.size or 0) > length:
                raise self._too_short(source, f"shape {list(source.shape)}, but {axis.stop(axis.size or 0)}")
        wanted, there = (prod(axis.size or 0 for axis in selection) for selection in (virtual, chosen))
        if wanted != there:
            raise self._too_short(source, f"{there} values there, but {wanted}")
        return Mapping(source, chosen, virtual, False)

    def _endless(self, virtual: Selection, chosen: Selection, file: str, name: str) -> Mapping:
        source = self._source(file, name)
        if inner_size(virtual) != inner_size(chosen):
            raise self._refusal("grows, but not by whole rows of its sources")
        count = chosen[0].below(source.shape[0])
        self._growing.append((virtual[0], source, count))
        chosen, virtual = ((replace(s[0], size=count), *s[1:]) for s in (chosen, virtual))
        return Mapping(source, chosen, virtual, False)

    def _count(self, file: str, name: str) -> int:
        """How many sources there are, by the largest number in a name. Raises `DataError` for one that is
        missing before it."""
        if _numbered(file, 0) != _numbered(file, 1):
            first = self._files.path_of(_numbered(file, 0), self._home, self._what)
            pattern = _pattern(os.path.basename(file))
            names = os.listdir(os.path.dirname(first) or ".")
        else:
            source = self._files.path_of(_numbered(file, None), self._home, self._what)
            parent, _, last = name.rpartition("/")
            pattern = _pattern(last)
            opened = self._files.another()
            try:
                with explained(source, CHANGED):
                    root = opened.open(source)
                    names = (
                        list(find(root, parent, source, opened) or ()) if parent.strip("/") else list(root)
                    )
            finally:
                opened.close()
        if pattern is None:
            raise self._refusal("has numbered folders or groups as sources")
        numbers = [int(match["number"]) for match in map(pattern.fullmatch, names) if match]
        return max(numbers, default=0) + 1

    def _source(self, file: str, name: str) -> Source:
        path = self._files.path_of(file, self._home, self._what)
        if (path, name) not in self._sources:
            opened = self._files.another()
            try:
                with explained(f"{path}: dataset `{shown(name.strip('/'))}`", CHANGED):
                    self._sources[path, name] = self._checked(opened, path, name)
            finally:
                opened.close()
        return self._sources[path, name]

    def _checked(self, files: LinkedFiles, path: str, name: str) -> Source:
        dataset = find(files.open(path), name, path, files)
        if not isinstance(dataset, h5py.Dataset):
            raise DataError(
                f"{path}: no dataset `{shown(name.strip('/'))}`, of which {self.where} has values. Put it "
                "there, or write the virtual dataset without it."
            )
        file = dataset.file.filename
        self._written = file if dataset.file.swmr_mode else self._written
        if dataset.is_virtual:
            sources = [m.source for m in mappings_of(dataset, files, self._depth + 1)]
            chunk_rows = max((s.chunk_rows for s in sources), default=0)
            filtered = any(s.filtered for s in sources)
        else:
            if dataset.external:
                raise self._refusal(f"has a source with external storage, `{shown(name)}` of {file}")
            require_filters(dataset, file, dataset.name.strip("/"))
            chunk_rows = dataset.chunks[0] if dataset.chunks else 0
            filtered = dataset.id.get_create_plist().get_nfilters() > 0
        require_same_packing(self._dataset, dataset, file, dataset.name.strip("/"))
        if not dataset.shape:
            raise self._refusal(f"has a single value as a source, `{shown(name)}` of {file}")
        return Source(
            path=path,
            name=name,
            file=file,
            shape=tuple(map(int, dataset.shape)),
            chunk_rows=int(chunk_rows),
            filtered=filtered,
            depth=self._depth,
            identity=identity_of(dataset),
        )

    def _refusal(self, what: str) -> UnsupportedShard:
        return UnsupportedShard(
            f"{self.where} {what}. Expected rows of its sources one after the other, or side by side: write "
            f"it again, {by_h5py(f'new[{self._name!r}] = old[{self._name!r}][...]')}"
        )

    def _too_short(self, source: Source, what: str) -> DataError:
        return DataError(
            f"{source.where} has {what} are expected by {self.where}. The file is incomplete: copy it again, "
            "or write the virtual dataset for what is there."
        )


def identity_of(dataset: h5py.Dataset) -> tuple[int, int, int]:
    """What identifies a dataset, whatever its names: device and inode of its file, and its address there."""
    status = os.stat(dataset.file.filename)
    return status.st_dev, status.st_ino, int(h5py.h5o.get_info(dataset.id).addr)


def _numbered(name: str, number: int | None) -> str:
    """The name of a source, with its number in place of `%b`."""
    return _SUBSTITUTE.sub(lambda match: "%" if match[1] == "%" else str(number), name)


def _pattern(name: str) -> re.Pattern[str] | None:
    """What fits the last part of the names of sources, with their number as the group `number`; None if it
    is not in this part."""
    parts = _SUBSTITUTE.split(name)
    number = "(?P<number>0|[1-9][0-9]*)"
    texts = [re.escape(part) for part in parts]
    for index in range(1, len(parts), 2):  # what was between texts: `b` or `%`
        texts[index] = number if parts[index] == "b" else "%"
        number = "(?P=number)" if parts[index] == "b" else number
    return re.compile("".join(texts)) if "b" in parts[1::2] else None
