"""Labels that are read while a file is open for its header: to open it again would take longer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import final

from hvd_train.config import DataConfig
from hvd_train.data.blocks import class_counts, row_bytes
from hvd_train.data.format import ShardInfo, is_class_dtype
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.labels import Labels, join, labels_of, labels_of_header
from hvd_train.data.python.registry import made_of
from hvd_train.errors import DataError

MOST_BYTES = 1 << 20
"""Of one field of a shard; more is read by all ranks, each its part."""

MOST_CLASSES = 256
"""That an index counts: more would make it large."""


@final
class HeaderLabels:
    """The labels of the shards whose headers this rank reads, those of small fields.

    Args:
        ignore: by the names of the fields that are summarized, the targets first: whether `IGNORED` marks
            values there that do not count.
    """

    def __init__(self, ignore: Mapping[str, bool]) -> None:
        self._ignore = ignore
        self._targets = next(iter(ignore), "")
        self._found: dict[str, Labels] = {}

    def read(self, file: ShardFile) -> None:
        """Reads the small fields of an open shard. Raises `DataError`."""
        info, found = file.info, []
        for name, ignore in self._ignore.items():
            if self.covers(info, name) and info.num_samples:
                values = file.read(name, 0, info.num_samples)
                found.append(labels_of(values, name, info.path, ignore=ignore))
        if found:
            self._found[info.path] = join(found)

    def covers(self, info: ShardInfo, name: str) -> bool:
        """Whether the rank that reads the header of a shard reads the labels of this field: the same on every
        rank."""
        if name not in self._ignore or info.growing or made_of(info.path):
            return False
        if name == self._targets and labels_of_header(info, name) is not None:
            return False
        field = info.fields[name]
        classes = is_class_dtype(field.dtype) and is_class_dtype(info.fields[self._targets].dtype)
        small = info.num_samples * row_bytes(field) <= MOST_BYTES and not info.layouts[name].is_large
        return classes and small and field.padding is None

    def covers_any(self, info: ShardInfo) -> bool:
        """Whether it reads labels of a shard at all."""
        return any(self.covers(info, name) for name in self._ignore)

    def of(self, infos: Iterable[ShardInfo]) -> list[Labels]:
        """What was found in those of the shards that this rank has read."""
        return [self._found[info.path] for info in infos if info.path in self._found]


def header_labels(data: DataConfig, *, tokens: bool = False) -> HeaderLabels:
    """What reads labels with the headers. None with a screen, which needs more than the header of one
    shard."""
    screened = data.on_damage == "skip"
    return HeaderLabels({} if screened else summarized(data.inputs, data.targets, tokens))


def summarized(inputs: str, targets: str, tokens: bool) -> dict[str, bool]:
    """The fields whose integers are summarized, and whether some may be marked as ignored: not a target that
    is also an input token."""
    if not tokens:
        return {targets: True}
    return {targets: False} if inputs == targets else {targets: True, inputs: False}


def require_as_indexed(file: ShardFile, known: ShardInfo) -> None:
    """Raises `DataError` where an open shard is not what an index recorded of it."""
    info = file.info
    inputs, targets = known.indexed or ("", "")
    seen = {
        "header": info.continues(known) and info.unpacked == known.unpacked,
        "scale": inputs not in info.fields or info.scale == known.scale,
        "number of rows of each class": targets not in info.fields
        or counted_classes(file, targets) == known.class_counts,
    }
    if wrong := [what for what, alike in seen.items() if not alike]:
        folder = os.path.dirname(info.path) or "."
        raise DataError(
            f"{info.path}: its {wrong[0]} is not what the index of its folder records. The index is damaged, "
            "or the file was changed and given its old time. Write the index again, with the data options of "
            f"the training: `hvd_train shard index {folder}`."
        )


def counted_classes(file: ShardFile, targets: str) -> tuple[int, ...] | None:
    """How many rows of an open shard have each class, for an index. As the file records it; of a foreign one,
    counted. None for targets that are not class numbers below `MOST_CLASSES`, one a row, and for many rows.
    Raises `DataError`."""
    info = file.info
    if info.class_counts is not None or targets not in info.fields:
        return info.class_counts
    if not HeaderLabels({targets: True}).covers(info, targets) or not info.num_samples:
        return None
    values = file.read(targets, 0, info.num_samples)
    if not values.size or values.min() < 0 or (most := int(values.max())) >= MOST_CLASSES:
        return None
    return tuple(class_counts(values, most + 1).tolist())
