"""Where a reader is in its epoch, and the random numbers of its order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import msgspec
import numpy as np

from hvd_train.data.picked import AnyRows
from hvd_train.data.readers.base import Mode, RowNumbers
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import Count, checked


class SavedReader(msgspec.Struct, forbid_unknown_fields=True):
    """The state of a reader as a checkpoint holds it."""

    epoch: Count
    position: Count
    fingerprint: str


def saved_epoch(state: Mapping[str, Any]) -> int:
    """The epoch of a reader's state. Raises `RunDirectoryError` for anything else."""
    return checked(state, SavedReader).epoch


class Share(NamedTuple):
    """Which rows of a batch this rank takes, where ranks share it: a stretch. Stretches differ by at most one
    row."""

    rank: int = 0
    ranks: int = 1
    least: int = 1
    """Rows of a stretch. If there are fewer for each, the last ranks take none."""

    def of(self, start: int, stop: int) -> tuple[int, int]:
        """Its stretch of the rows `start` up to `stop`."""
        ranks = max(1, min(self.ranks, (stop - start) // self.least))
        first, last = (start + (stop - start) * min(r, ranks) // ranks for r in (self.rank, self.rank + 1))
        return first, last


ALONE = Share()


class Cursor:
    """The position of a reader, and the random generators that belong to its part of the data."""

    def __init__(self, rows: AnyRows, seed: int, mode: Mode, layout: bytes, share: Share = ALONE) -> None:
        # Names without folders: data that moved to another place is still the same data.
        part = [[PurePath(span.shard).name, span.start, span.stop] for span in rows.spans]
        digest = hashlib.blake2b(json.dumps([part, seed, mode]).encode(), digest_size=16)
        digest.update(layout + rows.mark)
        self.fingerprint = digest.hexdigest()
        self._share = share
        self.epoch = 0
        self.position = 0

    def random(self, *stream: int, epoch: int | None = None) -> np.random.Generator:
        """A generator for `epoch` (default: the cursor's), a different one for each `stream`."""
        entropy = (int(self.fingerprint, 16), self.epoch if epoch is None else epoch, *stream)
        return np.random.default_rng(np.random.SeedSequence(entropy))

    def advance(self, size: int, num_samples: int) -> tuple[int, int]:
        """Passes the next `size` rows, or those that are left; returns the positions of this rank's share."""
        if size < 1:
            raise ValueError(f"a batch of {size} rows: expected at least 1")
        start, self.position = self.position, min(self.position + size, num_samples)
        return self._share.of(start, self.position)

    def drawn_since(
        self, state: Mapping[str, Any], num_samples: int, rows_at: Callable[[int, int, int], RowNumbers]
    ) -> RowNumbers:
        """The numbers of the rows drawn since `state` was taken, in the order in which they were drawn first.

        Args:
            rows_at: the rows of an epoch from one position up to another.
        """
        began = state["epoch"]
        # What is left of its epoch and one epoch more are all rows.
        epochs = range(began, min(self.epoch, began + 1) + 1)
        starts = (state["position"] if epoch == began else 0 for epoch in epochs)
        stops = (self.position if epoch == self.epoch else num_samples for epoch in epochs)
        return np.concatenate([rows_at(*part) for part in zip(epochs, starts, stops, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "fingerprint": self.fingerprint}

    def read(self, state: Mapping[str, Any], num_samples: int) -> tuple[int, int, bool]:
        """Epoch, position, and whether the epoch is to be restarted. Raises `RunDirectoryError`."""
        saved = checked(state, SavedReader)
        if saved.fingerprint != self.fingerprint:
            return saved.epoch, 0, True
        if saved.position > num_samples:
            raise RunDirectoryError(f"`position` is {saved.position}, of {num_samples} rows")
        return saved.epoch, saved.position, False
