"""What a classification would say of targets, found while they are written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import final

from hvd_train.data import labels, values
from hvd_train.data.format import FieldSpec, is_class_dtype
from hvd_train.data.remarks import refusal
from hvd_train.data.sources.base import TARGETS, Block, Source


@final
class TargetRemark(Source):
    """A source that looks at the targets that pass.

    Args:
        target: what the targets are called in the file.
        path: the file, for the message.
    """

    def __init__(self, source: Source, target: str, path: str) -> None:
        self._source = source
        self._target = target
        self._path = path
        self._labels = labels.Labels()
        self._values = values.Values()

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return self._source.fields

    @property
    def num_rows(self) -> int | None:
        return self._source.num_rows

    @property
    def scale(self) -> float | None:
        return self._source.scale

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._source.class_names

    @property
    def files(self) -> Collection[str]:
        return self._source.files

    @property
    def position(self) -> tuple[int, int]:
        return self._source.position

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        row = start
        is_class = is_class_dtype(self.fields[TARGETS].dtype)
        for block in self._source.blocks(names, start):
            if not names:
                targets = block[TARGETS]
                if is_class:
                    seen = labels.labels_of(targets, self._target, self._path, row)
                    self._labels = labels.join((self._labels, seen))
                self._values = values.join((self._values, values.values_of(targets)))
                row += len(targets)
                del targets
            yield block
            del block  # a large row need not be there while the next is read

    def remark(self) -> str:
        """Why a classification would refuse the targets that passed; empty if it would not."""
        if not self._values.rows:
            return ""
        return refusal(self._labels, self._values, self.fields[TARGETS], self._target, self._path)
