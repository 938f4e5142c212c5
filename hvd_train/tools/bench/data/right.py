"""Checks that what is drawn are the samples: no figure is given for wrong ones."""

from __future__ import annotations

from contextlib import closing
from typing import Any, final

import numpy as np
import xxhash

from hvd_train.errors import DataError
from hvd_train.tools.bench.data.contestants import Contestant
from hvd_train.tools.bench.data.samples import Samples

_BATCHES = 3


@final
class Right:
    """Knows the rows of `samples`."""

    def __init__(self, samples: Samples) -> None:
        pairs = zip(samples.inputs, samples.targets, strict=True)
        self._times: dict[int, int] = {}
        for pair in pairs:
            digest = _digest(*pair)
            self._times[digest] = self._times.get(digest, 0) + 1
        self._rows = len(samples)

    def check(self, entry: Contestant, batch_size: int) -> None:
        """Raises `DataError` unless the first batches of an epoch are rows of the data with their targets,
        none of them more often than it is in the data."""
        left, drawn = dict(self._times), 0
        with closing(entry.batches(batch_size)) as batches:
            for _ in range(min(_BATCHES, -(-self._rows // batch_size))):
                inputs, targets = (np.asarray(values) for values in next(batches))
                drawn += len(targets)
                for pair in zip(inputs, targets, strict=True):
                    left[_digest(*pair)] = left.get(_digest(*pair), 0) - 1
        if drawn == 0 or min(left.values()) < 0:
            raise DataError(
                f"{entry.name}, {entry.setting}: its batches are not made of rows of the data. No figure is "
                "given for a wrong result."
            )


def _digest(*values: Any) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(np.asarray(value).tobytes() for value in values))
