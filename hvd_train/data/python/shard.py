"""A Python dataset as one shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import final

import numpy as np

from hvd_train.data.damage import Range, Unread
from hvd_train.data.format import Array, ShardInfo
from hvd_train.data.layout import Layout
from hvd_train.data.places import Places
from hvd_train.data.python.base import MadeSamples
from hvd_train.data.python.fields import Fields
from hvd_train.errors import DataError, UnsupportedShard


@final
class PythonShard:
    """The samples of a dataset, as rows. All fields of a sample are read at once.

    Args:
        made: the samples, settled.
        places: the names of the fields in a sample.
        part: the rows that are read, sooner or later.

    Raises `DataError` as `Fields` does.
    """

    file = None

    def __init__(self, made: MadeSamples, places: Places, part: Sequence[Range] = ()) -> None:
        self._made = made
        self._part = part
        self._fields = Fields(made.name, made.forms, places)
        rows = made.num_samples
        self.info = ShardInfo(
            path=made.name,
            num_samples=rows,
            fields=self._fields.specs,
            layouts={
                name: Layout(shape=(rows, *field.shape), itemsize=np.dtype(field.dtype).itemsize)
                for name, field in self._fields.specs.items()
            },
            contiguous=False,
            class_counts=None,
            scale=None,
            checksum_rows=None,
            facts_digest=None,
        )
        """The header."""

    def read_into(self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool) -> None:
        """See `OpenShard`."""
        at = 0
        for start, stop in ranges:
            end = at + stop - start
            self._read(start, stop, {name: out[at:end] for name, out in fields.items()})
            at = end

    def read_undamaged(
        self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool
    ) -> Iterator[Unread]:
        """See `OpenShard`. Makes sample by sample, each once."""
        if self._made.at_hand(self._fields.keys_of(fields)):
            with suppress(DataError):
                self.read_into(fields, ranges, verify=verify)
                return
        numbers = (row for start, stop in ranges for row in range(start, stop))
        for at, row in enumerate(numbers):
            one = {name: out[at : at + 1] for name, out in fields.items()}
            try:
                self._read(row, row + 1, one)
            except UnsupportedShard:
                raise
            except DataError as error:
                for out in one.values():
                    out.fill(0)
                yield Unread((row, row + 1), at, error)

    def close(self) -> None:
        """Does nothing: the dataset stays as long as the run."""

    def _read(self, start: int, stop: int, fields: Mapping[str, Array]) -> None:
        values = self._fields.values_of(fields, stop - start)
        self._made.read_into(start, stop, values, self._part)
        for name, out in fields.items():
            read = self._fields.convert(values, name, start)
            if read is not out:
                out[...] = read


def header_of(made: MadeSamples, places: Places) -> ShardInfo:
    """The header, of samples that are settled by it. Raises `DataError`."""
    targets = places.places.get(places.targets)
    made.settle(targets.dataset if targets else "")
    return PythonShard(made, places).info
