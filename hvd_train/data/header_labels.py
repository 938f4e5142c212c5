"""Labels that are read while a file is open for its header: to open it again would take longer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

from hvd_train.data.blocks import row_bytes
from hvd_train.data.format import ShardInfo, is_class_dtype
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.labels import Labels, join, labels_of, labels_of_header
from hvd_train.data.python.registry import made_of

MOST_BYTES = 1 << 20
"""Of one field of a shard; more is read by all ranks, each its part."""


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

    def of(self, infos: Iterable[ShardInfo]) -> list[Labels]:
        """What was found in those of the shards that this rank has read."""
        return [self._found[info.path] for info in infos if info.path in self._found]
