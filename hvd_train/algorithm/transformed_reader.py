"""The transformed batches of a rank, in the order of its reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch

from hvd_train.config.data import LastBatch
from hvd_train.data.batches import next_batch
from hvd_train.data.numbering import Numbering
from hvd_train.data.readers.base import ArrayBatch, Reader, RowNumbers
from hvd_train.data.readers.cursor import ALONE, Share
from hvd_train.data.screen import usable
from hvd_train.liveness import phase
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.draws import Draws
from hvd_train.tasks.transforming import Transform, takes_training, transform_of


class Raw(NamedTuple):
    """A batch to train on, before its transform."""

    arrays: ArrayBatch

    epoch: int

    rows: npt.NDArray[np.int64] | None
    """The number of each row in the whole data set; None where the transformer needs none."""


class Transformer(ABC):
    """Transforms batches in the order in which they are given. Not collective."""

    capacity: int
    """Batches that it may be given before their results are taken."""

    numbered: bool
    """Whether it needs the numbers of the rows."""

    @abstractmethod
    def give(self, raw: Raw) -> None:
        """Begins with a batch."""

    @abstractmethod
    def take(self) -> Batch:
        """The result of the batch that was given first. Raises what the transform raises."""

    @abstractmethod
    def discard(self) -> None:
        """Drops the batches that were given and not taken."""


@final
class InThread(Transformer):
    """Transforms a batch in the calling thread, when it is taken."""

    def __init__(self, task: Task, seed: int) -> None:
        self.capacity = 1
        self.numbered = takes_training(task)
        self._transform = transform_of(task)
        self._seed = seed
        self._given: Raw | None = None

    def give(self, raw: Raw) -> None:
        self._given = raw

    def take(self) -> Batch:
        raw, self._given = self._given, None
        assert raw is not None  # the caller gave it
        return apply(self._transform, self._seed, raw)

    def discard(self) -> None:
        self._given = None


def apply(transform: Transform, seed: int, raw: Raw) -> Batch:
    """A batch to train on, transformed."""
    batch = {name: torch.from_numpy(array) for name, array in raw.arrays.items()}
    return transform(batch, None if raw.rows is None else Draws(seed, raw.epoch, raw.rows))


class Drawn(NamedTuple):
    """A batch to train on."""

    batch: Batch | None
    """Transformed; None if all of its rows are left out."""

    left_out: Mapping[str, int]
    """Rows of it that are left out, by reason."""


class _Ahead(NamedTuple):
    """A batch that was drawn from the reader and not taken yet."""

    state: dict[str, Any]
    """Of the reader before the batch."""

    left_out: Mapping[str, int]

    is_given: bool
    """Whether the transformer has it: one without rows is not transformed."""


@final
class TransformedReader:
    """Reads a rank's rows as transformed batches. It is where `next_batch` is, though the reader may be ahead
    of it by the batches that the transformer has. The other methods are those of `Reader`."""

    def __init__(
        self,
        reader: Reader,
        transformer: Transformer,
        numbering: Numbering,
        *,
        batch_size: int,
        last_batch: LastBatch = "keep",
        share: Share = ALONE,
    ) -> None:
        self._reader = reader
        self._transformer = transformer
        self._numbering = numbering
        self._batch_size = batch_size
        self._last_batch: LastBatch = last_batch
        self._share = share
        self._drawn: deque[_Ahead] = deque()

    @property
    def num_samples(self) -> int:
        return self._reader.num_samples

    @property
    def restarted(self) -> bool:
        return self._reader.restarted

    def start_epoch(self, epoch: int) -> None:
        self._discard()
        self._reader.start_epoch(epoch)

    def next_batch(self) -> Drawn | None:
        """The next batch to train on; None once the epoch is exhausted."""
        phase("reading")
        while sum(batch.is_given for batch in self._drawn) < self._transformer.capacity and self._draw():
            pass
        if not self._drawn:
            return None
        phase("transforming")
        taken = self._drawn.popleft()
        return Drawn(self._transformer.take() if taken.is_given else None, taken.left_out)

    def _draw(self) -> bool:
        """Gives the transformer one more batch, if there is one."""
        reader = self._reader
        left, state = reader.left, reader.state_dict()
        before = reader.num_samples - left
        size = next_batch(left, self._batch_size, self._last_batch, taken=before)
        if not size:
            return False
        arrays = reader.next_batch(size)
        if arrays is None:  # this rank has no share in it
            self._drawn.append(_Ahead(state, {}, False))
            return True
        arrays, kept, left_out = _without_single_row(*usable(arrays))
        if len(kept):
            rows = None
            if self._transformer.numbered:
                rows = self._numbering(reader.origins(*self._share.of(before, before + size)))[kept]
            self._transformer.give(Raw(arrays, state["epoch"], rows))
        self._drawn.append(_Ahead(state, left_out, len(kept) > 0))
        return True

    def state_dict(self) -> dict[str, Any]:
        return self._drawn[0].state if self._drawn else self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._discard()
        self._reader.load_state_dict(state)

    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        if self._drawn:  # those batches have not been trained on
            self.load_state_dict(self._drawn[0].state)
        return self._reader.not_finite_since(state)

    def close(self) -> None:
        self._drawn.clear()
        self._reader.close()

    def _discard(self) -> None:
        self._drawn.clear()
        self._transformer.discard()


def _without_single_row(
    arrays: ArrayBatch, kept: RowNumbers, left_out: dict[str, int]
) -> tuple[ArrayBatch, RowNumbers, dict[str, int]]:
    """What `usable` gives, without a single row that is left of several: no batch has a single row."""
    if len(kept) == 1 and left_out:
        return arrays, kept[:0], {**left_out, "alone": 1}
    return arrays, kept, left_out
