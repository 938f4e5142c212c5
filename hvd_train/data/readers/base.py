"""The interface of readers: the shuffled batches of one rank's rows, epoch by epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hvd_train.data.format import Array
from hvd_train.data.numbering import Origins

ArrayBatch = dict[str, Array]
RowNumbers = npt.NDArray[np.int64]

Mode = Literal["memory", "mmap", "stream"]


class Reader(ABC):
    """The rows of one rank in an order that is a pure function of (seed, epoch, the rank's part).

    A new reader is at the start of epoch 0. No method is collective. `DataError` where a shard
    cannot be read.
    """

    mode: Mode
    """Which implementation this is."""

    why: str = "as data.reading says"
    """Why it is this one, as the end of a sentence."""

    num_samples: int
    """Rows of this rank's part; 0 for a rank without rows."""

    restarted: bool
    """Whether the last `load_state_dict` came from another part of the data (another world size, seed
    or mode), so that its epoch began anew instead of going on where it was."""

    @property
    @abstractmethod
    def left(self) -> int:
        """Rows of this epoch that are still to come."""

    @abstractmethod
    def open(self) -> None:
        """Reads what it holds in memory; else the first batch does. May be called twice."""

    @abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Sets the order of `epoch` and goes to its start."""

    @abstractmethod
    def next_batch(self, size: int) -> ArrayBatch | None:
        """The next `size` rows: {name: array [rows, *shape]}, in memory that is the caller's. Of a batch that
        ranks share, this rank's share.

        The last batch of an epoch may be smaller: no row is dropped and none comes twice. None once the
        epoch is exhausted, at once for a rank without rows, and for a batch of which this rank has no share.
        """

    @abstractmethod
    def origins(self, start: int, stop: int) -> Origins:
        """Where the rows at the positions `start` up to `stop` of this epoch are. Cheap for those of the
        batch that was drawn last."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and a fingerprint of what they refer to. JSON scalars only."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken: the next batch is the one that came next there.

        The state of another part goes to the start of its epoch instead, and sets `restarted`.
        """

    @abstractmethod
    def not_finite_since(self, state: Mapping[str, Any]) -> str:
        """Which of the rows drawn since `state` was taken is the first with a value that is not finite; empty
        if none is. See `first_not_finite`; reads the rows again."""

    @abstractmethod
    def close(self) -> None:
        """Ends the reader's thread and closes its files. May be called twice."""


def gather(batch: ArrayBatch, index: npt.NDArray[np.intp]) -> ArrayBatch:
    """The rows of `batch` at `index`, which must be in range, copied."""
    return {name: array.take(index, axis=0, mode="clip") for name, array in batch.items()}
