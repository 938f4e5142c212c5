"""The index of a folder: the headers of its files in one file, so that a training need not open each for its
header.

It is never trusted. Files are found by listing the folder, and an entry counts only while its file has the
size and the time that it records, and only if its values make sense; else the header is read. When a file is
opened for its rows, its header and classes are compared with what the index says of them.

The file has two lines of JSON: the schema and a digest of the second line, and an `Index`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import msgspec
import numpy as np

from hvd_train._version import __version__
from hvd_train.data.blocks import row_bytes
from hvd_train.data.facts import digest
from hvd_train.data.files import require_regular
from hvd_train.data.format import FieldSpec, ShardInfo, mask_name
from hvd_train.data.layout import Layout
from hvd_train.data.places import Place, Places
from hvd_train.errors import DataError
from hvd_train.io.atomic import replacing

INDEX_NAME = "hvd_train_index.json"
_SCHEMA = 1
_MOST_BYTES = 1 << 28
"""Of an index; 100,000 files take about a tenth of it."""
_MOST_ROWS_BYTES, _MOST_COMPRESSED = 1 << 30, 100_000
"""As where a header is read: no file has more bytes of values and, beyond that, for each of its bytes."""


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """One file, which is one shard."""

    size: int
    time_ns: int
    """When it was written last."""
    kind: int
    """The number of its header among the different ones."""
    class_counts: tuple[int, ...] | None = None
    facts_digest: str | None = None
    contents: str = ""
    """As of a `Header`."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """The headers of the files of a folder."""

    version: str
    """Of the program: another one may read headers in another way."""
    places: dict[str, str]
    """Of the fields, by their names, as text."""
    inputs: str
    targets: str
    masks: bool
    kinds: tuple[ShardInfo, ...]
    """Different headers, without what differs in most files."""
    files: dict[str, IndexedFile]
    """By their names in the folder."""

    def has(self, places: Places) -> bool:
        """Whether it has all of these fields, and by these places."""
        version, named, inputs, targets, masks = _key(places)
        same = (self.version, self.inputs, self.targets, self.masks) == (version, inputs, targets, masks)
        return same and named.items() <= self.places.items()

    def contradicts(self, places: Places) -> bool:
        """Whether it was written for other fields, rather than for more or fewer of them."""
        version, named, inputs, targets, _ = _key(places)
        same = (self.version, self.inputs, self.targets) == (version, inputs, targets)
        shared = named.keys() & self.places.keys()
        return not same or any(named[name] != self.places[name] for name in shared)


def empty_index(places: Places) -> Index:
    """An index for these fields."""
    version, named, inputs, targets, masks = _key(places)
    return Index(
        version=version, places=named, inputs=inputs, targets=targets, masks=masks, kinds=(), files={}
    )


def _key(places: Places) -> tuple[str, dict[str, str], str, str, bool]:
    named = {name: repr(place) for name, place in places.places.items()}
    return __version__, named, places.inputs, places.targets, places.masks


def write_index(folder: str, index: Index) -> Path:
    """Writes the index of a folder, atomically; returns its path. Raises OSError."""
    body = msgspec.json.encode(index)
    head = msgspec.json.encode({"schema": _SCHEMA, "digest": digest(body)})
    path = Path(folder) / INDEX_NAME
    with replacing(path) as temporary:
        temporary.write_bytes(head + b"\n" + body + b"\n")
    return path


def read_index(folder: str) -> Index | None:
    """The index of a folder; None where there is none. Raises `DataError` for one that cannot be used."""
    path = Path(folder) / INDEX_NAME
    try:
        require_regular(path, "the index that `hvd_train shard index` writes")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: {size:,} bytes, expected at most {_MOST_BYTES:,}.")
        head, _, body = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    body = body.removesuffix(b"\n")
    try:
        values = msgspec.json.decode(head)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != _SCHEMA:
            raise DataError(f"{path}: schema {schema!r}; this program reads schema {_SCHEMA}.")
        if values.get("digest") != digest(body):
            raise DataError(f"{path}: not what was written: it was damaged or changed.")
        return msgspec.json.decode(body, type=Index)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: not an index: {error}.") from None


@final
class Indexes:
    """The indexes of the folders of some files, each read when the first file of its folder is asked for.

    Args:
        places: of the fields.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._read: dict[str, Index | None] = {}
        self.unusable: list[str] = []
        """Why indexes are not used, one message each."""
        self.outdated: dict[str, int] = {}
        """Files that are not as the index records them, by the path of the index."""

    def header(self, path: str) -> tuple[ShardInfo, str] | None:
        """The header of a file, without its name, and a hash of its contents. None where no index knows
        them."""
        folder, name = os.path.split(path)
        if folder not in self._read:
            self._read[folder] = self._usable(folder)
        index = self._read[folder]
        if index is None:
            return None
        try:
            status = os.stat(path)
        except OSError:  # who opens it says so
            return None
        file = index.files.get(name)
        if file is not None and (file.size, file.time_ns) == (status.st_size, status.st_mtime_ns):
            info = _info(index, file, self._places)
            if info is not None and _makes_sense(info, file.size, self._places):
                return None if _says_more(index, file, self._places) else (info, file.contents)
        index_path = os.path.join(folder, INDEX_NAME)
        self.outdated[index_path] = self.outdated.get(index_path, 0) + 1
        return None

    def _usable(self, folder: str) -> Index | None:
        if not_indexed(self._places):
            return None
        try:
            index = read_index(folder)
        except DataError as error:
            self.unusable.append(f"{error} The headers of the files were read. {rewrite(folder)}.")
            return None
        if index is None or index.has(self._places):
            return index
        if index.contradicts(self._places):
            self.unusable.append(
                f"{os.path.join(folder, INDEX_NAME)}: written for other fields or by another version of "
                f"hvd_train. The headers of the files were read. {rewrite(folder)}."
            )
        return None


def not_indexed(places: Places) -> str:
    """Why files with such fields have no index; empty if they may have one."""
    if places.has_groups:
        return "to know the groups of a file, it has to be opened"
    if places.follow_links:
        return "size and time of a file do not tell whether those have changed that its links lead to"
    return ""


def rewrite(folder: str) -> str:
    """How to write the index of a folder again, as the beginning of a sentence."""
    return f"Write it again with the data options of the training: `hvd_train shard index {folder or '.'}`"


def _info(index: Index, file: IndexedFile, places: Places) -> ShardInfo | None:
    """The header, of these fields; None without one."""
    if not 0 <= file.kind < len(index.kinds):
        return None
    kind = index.kinds[file.kind]
    unwanted = index.places.keys() - places.places.keys()
    return replace(
        kind,
        path="",
        fields={name: field for name, field in kind.fields.items() if name not in unwanted},
        layouts={name: layout for name, layout in kind.layouts.items() if name not in unwanted},
        class_counts=file.class_counts if places.targets in places.places else None,
        facts_digest=file.facts_digest,
        indexed=(index.inputs, index.targets),
    )


def _says_more(index: Index, file: IndexedFile, places: Places) -> bool:
    """Whether some of it is of fields that are not wanted."""
    return bool(
        index.places.keys() - places.places.keys() and (file.contents or index.kinds[file.kind].unpacked)
    )


def _makes_sense(info: ShardInfo, file_bytes: int, places: Places) -> bool:
    """Whether a file of so many bytes may have this header. One without rows would never be opened, and is
    read."""
    counts = info.class_counts or ()
    return (
        info.num_samples > 0
        and info.fields.keys() == info.layouts.keys()
        and _are_of(info.fields, places)
        and all(_field_makes_sense(field, info.num_samples, file_bytes) for field in info.fields.values())
        and all(map(_layout_makes_sense, info.layouts.values()))
        and (info.scale is None or math.isfinite(info.scale))
        and (info.checksum_rows is None or info.checksum_rows >= 1)
        and not info.growing
        and all(count >= 0 for count in counts)
        and (not counts or places.targets in info.fields)
    )


def _are_of(fields: Mapping[str, FieldSpec], places: Places) -> bool:
    """Whether they may be at these places: a file is opened by what its fields say."""
    wanted = dict(places.places)
    for name, place in places.places.items() if places.masks else ():
        if place.padding is not None:
            marks = replace(place.padding, marks=True)
            wanted[mask_name(name)] = replace(place, coding=None, padding=marks)
    return set(places.places) <= fields.keys() <= wanted.keys() and all(
        _is_of(field, name, wanted[name]) for name, field in fields.items()
    )


def _is_of(field: FieldSpec, name: str, place: Place) -> bool:
    coding, text = place.coding, str(place)
    if coding is not None and coding.one_hot and not coding.names and field.coding is not None:
        coding = replace(coding, names=tuple(map(str, range(len(field.coding.names)))))
    same = (field.place, field.axis, field.coding) == ("" if text == name else text, place.axis, coding)
    return same and not field.follow_links and field.padding in (None, place.padding)


def _field_makes_sense(field: FieldSpec, num_samples: int, file_bytes: int) -> bool:
    try:
        kind = np.dtype(field.dtype).kind
    except (TypeError, ValueError):
        return False
    if kind not in "iufb" or any(length < 0 for length in field.shape):
        return False
    most = _MOST_ROWS_BYTES + _MOST_COMPRESSED * file_bytes
    return num_samples * max(1, row_bytes(field)) <= most * (1 if field.padding is None else 1 << 20)


def _layout_makes_sense(layout: Layout) -> bool:
    if not layout.shape or layout.itemsize < 1 or any(length < 0 for length in layout.shape):
        return False
    return layout.chunk is None or (
        len(layout.chunk) == len(layout.shape) and all(length >= 1 for length in layout.chunk)
    )


def lines(parts: Mapping[str, int], unusable: list[str], num_files: int) -> list[str]:
    """What a user should know of indexes, one line each."""
    found = [
        f"{path}: {count:,} of {num_files:,} files are not as it records them: their headers were read. "
        f"{rewrite(os.path.dirname(path))}."
        for path, count in parts.items()
    ]
    return [*dict.fromkeys(unusable), *found]
