"""The samples on which an exported model is compared with the run's model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from hvd_train.after.trained import Trained
from hvd_train.config import Config
from hvd_train.data.catalog import Shards, find_shards, whole
from hvd_train.data.deal import Span, split_validation
from hvd_train.data.growing import refuse_growing
from hvd_train.data.rows import Rows
from hvd_train.data.selection import select_rows
from hvd_train.errors import DataError
from hvd_train.io.output import warn
from hvd_train.tasks.base import Batch

_BATCH_SIZES = (1, 2, 5)
"""The first batches; all others have `_BATCH_SIZE` rows, and the last one what is left."""

_BATCH_SIZE = 64


@final
class Samples:
    """The first `count` rows of `spans`, or as many as there are, in batches of different sizes.

    Args:
        source: where they are from, in words.
    """

    def __init__(self, spans: Sequence[Span], trained: Trained, count: int, source: str) -> None:
        sample = trained.saved.sample
        self._rows = Rows(spans, sample.fields)
        self.count = min(count, len(self._rows))
        self.source = source

    def batches(self) -> Iterator[Batch]:
        """Every row once. Raises `DataError`."""
        sizes = itertools.chain(_BATCH_SIZES, itertools.repeat(_BATCH_SIZE))
        start = 0
        while start < self.count:
            stop = min(start + next(sizes), self.count)
            yield _tensors(self._rows.read(start, stop))
            start = stop

    def repeated(self, size: int) -> Batch:
        """A batch of exactly `size` rows: if there are fewer, some of them are in it several times."""
        batch = _tensors(self._rows.read(0, min(size, len(self._rows))))
        index = torch.arange(size) % min(size, len(self._rows))
        return {name: tensor[index] for name, tensor in batch.items()}

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()


def _tensors(arrays: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def open_samples(trained: Trained, path: str, count: int) -> Samples:
    """Of the shards that `path` names; if it is empty, of the run's validation rows, else of its training
    rows. Raises `DataError`."""
    sample = trained.saved.sample
    if path:
        selected = select_rows(path, sample, tuple(sample.fields))
        for line in selected.warnings:
            warn(line)
        return Samples(selected.spans, trained, count, path)
    part = run_part(trained.config)
    for name, field in sample.fields.items():
        if part.shards.sample.fields[name] != field:
            raise DataError(
                f"{trained.config.data.path}: `{name}` is {part.shards.sample.fields[name]}; the model was "
                f"trained on {field}. Give samples like those by --data."
            )
    spans, kind = (part.validation, "validation") if part.validation else (part.train, "training")
    return Samples(spans, trained, count, f"{trained.config.data.path} ({kind} rows)")


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run, by the headers of its shards."""

    shards: Shards
    train: tuple[Span, ...]
    validation: tuple[Span, ...]


def run_part(config: Config) -> RunData:
    """The rows that a run was trained and evaluated on. Raises `DataError` if its shards are not there any
    more."""
    try:
        shards = find_shards(config.data)
        refuse_growing((*shards.train, *shards.validation))
    except DataError as error:
        raise DataError(f"the run's data: {error} Or give samples for the comparison by --data.") from None
    train, validation = whole(shards.train), whole(shards.validation)
    if isinstance(config.data.validation, float):
        train, validation = split_validation(train, config.data.validation)
    return RunData(shards=shards, train=train, validation=validation)
